"""The optimizer's strategies on several ranks: states that move between layouts bit by bit, and steps that stay neutral."""

from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load
from trainkit.parallel import Parallel, Ranks

WHAT = [
    *SMALL,
    "model.width=72",
    "data.batch=12",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "evaluation.sample_tokens=0",
]


def run(*overrides: str) -> None:
    """Train, as the command line does."""
    chosen = runs.composed([*WHAT, *overrides])
    with build.trainer(chosen, Path("runs") / chosen.name) as trainer:
        trainer.fit()


def saved(which: str) -> dict[str, torch.Tensor]:
    found = load(find.resolve(which, Path("runs"), launch.policy)).tensors
    return {k: v for k, v in found.items() if k.startswith(("model.", "optimizer."))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def goes_on(*overrides: str) -> None:
    """Load the run's newest checkpoint in this layout, and compare every number with what is on the disk."""
    chosen = runs.composed([*WHAT, *overrides])
    with build.trainer(chosen, Path("runs") / chosen.name) as trainer:
        there = saved(chosen.name)
        for name, tensor in trainer.learner.tensors().items():
            if name in there:
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                assert torch.equal(whole.cpu(), there.pop(name)), name
        assert not there
        trainer.learner.train_step()  # and it can be learned with


@pytest.mark.timeout(300)
def test_states_move_between_layouts_bit_by_bit() -> None:
    in_ranks(2, run, "name=moved", "memory=8bit", "parallel=fsdp", "stop_at=3")
    assert any(key.endswith("_scale") for key in saved("moved"))
    goes_on("name=moved", "memory=8bit")
    in_ranks(2, goes_on, "name=moved", "memory=8bit", "parallel=ddp")
    in_ranks(4, goes_on, "name=moved", "memory=8bit", "parallel=fsdp")
    run("name=other", "memory=4bit", "stop_at=3")
    in_ranks(3, goes_on, "name=other", "memory=4bit", "parallel=fsdp")  # rows that do not divide


@pytest.mark.timeout(300)
def test_the_same_ranks_go_on_to_the_bit() -> None:
    how = ["parallel=fsdp", "memory=8bit+offload_optimizer", "memory.microbatch=2"]
    in_ranks(2, run, "name=whole", *how)
    in_ranks(2, run, "name=parts", *how, "stop_at=3")
    in_ranks(2, run, "name=parts", *how)
    assert same(saved("parts"), saved("whole"))


@pytest.mark.timeout(300)
def test_the_format_changes_between_layouts() -> None:
    in_ranks(2, run, "name=t", "parallel=fsdp", "stop_at=3")
    in_ranks(3, run, "name=t", "parallel=fsdp", "stop_at=4", "memory=8bit")
    assert any(key.endswith("_int8_scale") for key in saved("t"))
    run("name=t", "steps=6", "memory=baseline")
    assert not any("_int8" in key for key in saved("t"))


def learned(ranks: Ranks, *overrides: str) -> list[torch.Tensor]:
    """This rank's part of the weights after two steps."""
    chosen = runs.composed([*WHAT, "name=t", f"parallel={ranks.kind}", *overrides])
    it = build.learner(chosen, chosen.data.open(), ranks)
    for _ in range(2):
        it.train_step()
    return [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in it.parameters]


def neutral(kind: str, pairs: list[tuple[list[str], list[str]]]) -> None:
    ranks = Parallel(kind=kind, device="cpu").join(torch.device("cpu"))  # type: ignore[arg-type]  # one of its kinds
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(learned(ranks, *one), learned(ranks, *other), strict=True)), other
    if kind == "ddp":
        wide, narrow = (learned(ranks, "optimizer=sgd", *how) for how in ([], ["memory.grad_dtype=bfloat16"]))
        for a, b in zip(wide, narrow, strict=True):
            assert not torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
    ranks.leave()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_where_and_when_the_step_is_made_does_not_matter(kind: str) -> None:
    pairs: list[tuple[list[str], list[str]]] = [([], ["memory=offload_optimizer"])]
    if kind == "fsdp":
        pairs.append((["optimizer=muon"], ["optimizer=muon", "memory=offload_optimizer"]))
        pairs += [
            ([f"memory={plain}", "clip=0"], [f"memory={plain}+step_in_backward", "clip=0"])
            for plain in ("baseline", "8bit")
        ]
    in_ranks(2, neutral, kind, pairs)
