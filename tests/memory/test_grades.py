"""Every strategy, and every two of them, learns what no strategy learns: to the bit where its grade is exact."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.parallel import Ranks

STRATEGIES = ["checkpoint", "selective", "offload_activations", "stream", "fused_loss", "baseline"]
EXACT = {"checkpoint", "selective", "offload_activations", "stream", "baseline"}
SGD = ["optimizer=sgd", "optimizer.lr=0.1", "clip=0", "model.depth=3"]  # a wrong scale shows in it
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6}


def learned(*overrides: str, ranks: Ranks | None = None, steps: int = 3) -> list[torch.Tensor]:
    """All weights after some steps, each in one piece."""
    run = runs.composed([*SMALL, *overrides, "name=t"])
    joined = ranks or build.ranks(run)
    try:
        it = build.learner(run, run.data.open(), joined)
        for _ in range(steps):
            it.train_step()
        return [joined.whole(p.detach()).clone() for p in it.model.parameters()]
    finally:
        if ranks is None:
            joined.leave()


def words(*strategies: str) -> list[str]:
    above = ["memory.offload_activations.above_mb=0"] if "offload_activations" in strategies else []
    return [f"memory={'+'.join(strategies)}", *above]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check(strategies: tuple[str, ...], ours: list[torch.Tensor], plain: list[torch.Tensor], precision: str) -> None:
    if set(strategies) <= EXACT:
        assert equal(ours, plain), strategies
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_keeps_its_grade(strategy: str, precision: str) -> None:
    what = ["model.dropout=0.2", f"precision={precision}", "memory.microbatch=2", "model.depth=3"]
    for optimizer in (["optimizer=adamw"], SGD[:3]):
        plain = learned(*what, *optimizer, "memory=default")
        check((strategy,), learned(*what, *optimizer, *words(strategy)), plain, precision)


@pytest.mark.parametrize("pair", list(combinations(STRATEGIES, 2)), ids="+".join)
def test_any_two_go_together(pair: tuple[str, str]) -> None:
    what = ["model.dropout=0.2", "optimizer=sgd", "optimizer.lr=0.1", "model.depth=3"]
    check(pair, learned(*what, *words(*pair)), learned(*what, "memory=default"), "fp32")
    assert runs.composed(words(*pair)) == runs.composed(words(*reversed(pair)))


def test_all_of_them_go_together() -> None:
    what = ["optimizer=sgd", "optimizer.lr=0.1", "model.depth=3", "precision=fp64"]
    check(tuple(STRATEGIES), learned(*what, *words(*STRATEGIES)), learned(*what, "memory=default"), "fp64")


def on_ranks(kind: str) -> None:
    first = runs.composed([*SMALL, f"parallel={kind}", "name=t"])
    joined = build.ranks(first)
    for precision in TOLERANCE:
        what = [*SGD, "model.dropout=0.2", f"precision={precision}", f"parallel={kind}", "memory.microbatch=1"]
        plain = learned(*what, "memory=default", ranks=replace(joined))
        for strategy in STRATEGIES:
            if strategy == "stream" and kind == "ddp":
                with pytest.raises(
                    UserError, match="memory=stream holds slices of the model and parallel=ddp all of it"
                ):
                    runs.composed([f"parallel={kind}", "memory=stream"])
                continue
            ranks = replace(joined, stream=strategy == "stream")
            ours = learned(*what, *words(strategy), ranks=ranks)
            if strategy == "stream":  # it sums over the ranks after every microbatch, FSDP alone after the last
                torch.testing.assert_close(ours, plain, rtol=TOLERANCE[precision], atol=TOLERANCE[precision])
            else:
                check((strategy,), ours, plain, precision)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_keep_the_grades(kind: str) -> None:
    in_ranks(2, on_ranks, kind)


REFUSED = {
    (
        "parallel=ddp",
        "memory=stream",
    ): "memory=stream holds slices of the model and parallel=ddp all of it: use parallel",
    ("deterministic=elastic", "memory=stream"): "deterministic=elastic sums whole gradients itself: memory=stream has",
    ("precision=fp16", "memory=stream"): "float16's scaler has no part: use precision=bf16",
    ("memory.checkpoint.budget=0.5",): "memory.checkpoint.budget is kept by the compiler: use compile=full or",
    (
        "compile=full",
        "memory=selective",
        "memory.checkpoint.budget=0.5",
    ): "memory.checkpoint.every and memory.checkpoint",
    ("memory.microbatch=many",): "memory.microbatch=many",
    ("memory.microbatch=0",): "memory.microbatch=0",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_go_together_is_refused_in_a_sentence(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=REFUSED[overrides]) as refused:
        runs.composed(list(overrides))
    assert "\n" not in str(refused.value)
