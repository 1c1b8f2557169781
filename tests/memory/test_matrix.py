"""Every two strategies of conf/memory, on one process and on two ranks: they learn what they should, or are refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from tests.conftest import SMALL
from tests.memory.test_grades import learned, words
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.choices import CONF, choices
from trainkit.errors import UserError
from trainkit.parallel import Ranks

STATES = {"8bit", "4bit", "fp8"}
EVERY = sorted(set(choices(CONF)["memory"]) - {"default"})
PAIRS = list(combinations(EVERY, 2))
WHAT = ["model.width=64", "model.depth=2", "optimizer.lr=0.01", "clip=0", "precision=fp64"]
REFUSED = {
    **{frozenset(pair): "take one of the two" for pair in combinations(STATES, 2)},
    frozenset({"offload_optimizer", "step_in_backward"}): "wants many gradients at once",
    frozenset({"offload_optimizer", "stream"}): "memory=stream steps on the host already",
    frozenset({"step_in_backward", "stream"}): "memory=stream brings gradients to the host after the backward",
}
WITH_DDP = {"stream": "use parallel=fsdp", "step_in_backward": "use parallel=fsdp"}


def outcomes(kind: str, ranks: Ranks) -> Iterator[tuple[tuple[str, str], list[torch.Tensor], list[torch.Tensor]]]:
    """What every pair learned that is not refused, and what it should have learned: what its states alone would have."""
    alone: dict[str, list[torch.Tensor]] = {}
    what = [*WHAT, f"parallel={kind}"]
    for pair in PAIRS:
        states = next(iter(STATES & set(pair)), "default")
        if states not in alone:
            alone[states] = learned(*what, f"memory={states}", ranks=replace(ranks), steps=2)
        of_ddp = next((WITH_DDP[name] for name in pair if name in WITH_DDP and kind == "ddp"), None)
        said = of_ddp or REFUSED.get(frozenset(pair))
        if said is not None:
            with pytest.raises(UserError, match=said) as refused:
                runs.composed([*SMALL, *what, *words(*pair), "name=t"])
            assert "\n" not in str(refused.value)
            continue
        here = replace(ranks, kind="fsdp" if "stream" in pair else ranks.kind, stream="stream" in pair)
        yield pair, learned(*what, *words(*pair), ranks=here, steps=2), alone[states]


def check(kind: str, ranks: Ranks) -> None:
    for pair, ours, wanted in outcomes(kind, ranks):
        reordered = "fused_loss" in pair or ("stream" in pair and kind != "single")
        near = 1e-9 if reordered else 0.0
        if reordered and STATES & set(pair):
            near = 1e-2  # a sum that is rounded the other way may choose another code
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=near, atol=near, msg=lambda said, pair=pair: f"{pair}: {said}"
            )


def on_ranks(kind: str) -> None:
    check(kind, build.ranks(runs.composed([*SMALL, f"parallel={kind}", "name=t"])))


def test_every_pair_learns_the_same_or_is_refused() -> None:
    first = build.ranks(runs.composed([*SMALL, "memory=stream", "name=t"]))
    try:
        check("single", replace(first, kind="single", stream=False))
    finally:
        first.leave()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_on_two_ranks_too(kind: str) -> None:
    in_ranks(2, on_ranks, kind)
