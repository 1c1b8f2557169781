"""The optimizer's strategies on several ranks: states that move between layouts bit by bit, and steps that stay neutral."""

from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load

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


LAYOUTS = [(1, "single"), (2, "ddp"), (3, "fsdp"), (4, "fsdp")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("memory", "size", "kind"), [("8bit", 2, "fsdp"), ("8bit", 4, "fsdp"), ("4bit", 1, "single")])
def test_states_move_between_layouts_bit_by_bit(memory: str, size: int, kind: str) -> None:
    how = ["name=moved", f"memory={memory}"]
    in_ranks(size, run, *how, f"parallel={kind}", "stop_at=3")
    assert any(key.endswith("_scale") for key in saved("moved"))
    for number, other in LAYOUTS:
        in_ranks(number, goes_on, *how, f"parallel={other}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("memory", ["8bit", "4bit", "8bit+offload_optimizer"])
def test_the_same_ranks_go_on_to_the_bit(memory: str) -> None:
    how = ["parallel=fsdp", f"memory={memory}", "memory.microbatch=2"]
    in_ranks(2, run, "name=whole", *how)
    in_ranks(2, run, "name=parts", *how, "stop_at=3")
    in_ranks(2, run, "name=parts", *how)
    assert same(saved("parts"), saved("whole"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("memory", "kind", "optimizer"),
    [
        ("offload_optimizer", "ddp", "adamw"),
        ("offload_optimizer", "fsdp", "adamw"),
        ("offload_optimizer", "fsdp", "muon"),
        ("step_in_backward", "fsdp", "adamw"),
    ],
)
def test_where_and_when_the_step_is_made_does_not_matter(memory: str, kind: str, optimizer: str) -> None:
    how = [f"parallel={kind}", "clip=0", f"optimizer={optimizer}"]
    in_ranks(2, run, "name=plain", *how)
    in_ranks(2, run, "name=other", *how, f"memory={memory}")
    assert same(saved("other"), saved("plain"))


@pytest.mark.timeout(300)
def test_the_format_changes_between_layouts() -> None:
    in_ranks(2, run, "name=t", "parallel=fsdp", "stop_at=3")
    in_ranks(3, run, "name=t", "parallel=fsdp", "stop_at=6", "memory=8bit")
    assert any(key.endswith("_int8_scale") for key in saved("t"))
    run("name=t", "steps=6", "memory=baseline")


@pytest.mark.timeout(300)
def test_narrow_gradients_are_summed_over_ranks() -> None:
    in_ranks(2, run, "name=wide", "parallel=ddp")
    in_ranks(2, run, "name=narrow", "parallel=ddp", "memory.grad_dtype=bfloat16")
    for name, tensor in saved("wide").items():
        if name.startswith("model."):
            torch.testing.assert_close(saved("narrow")[name], tensor, rtol=0, atol=1e-2)
            assert not torch.equal(saved("narrow")[name], tensor) or tensor.ndim == 1
