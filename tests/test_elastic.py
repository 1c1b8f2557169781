"""The same run on any number of ranks: to the bit on the same ranks, to a tolerance on others, to the bit with exact sums."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load

ELASTIC = [*SMALL, "data.batch=12", "steps=8", "checkpoint.every=2", "checkpoint.keep=9", "evaluation.sample_tokens=0"]
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}


def run(*overrides: str) -> None:
    """Train, as the command line does."""
    chosen = runs.composed([*ELASTIC, *overrides])
    with build.trainer(chosen, Path("runs") / chosen.name) as trainer:
        trainer.fit()


def weights(name: str) -> dict[str, torch.Tensor]:
    tensors = load(find.resolve(name, Path("runs"), launch.policy)).tensors
    return {k: v for k, v in tensors.items() if k.startswith("model.")}


def losses(name: str) -> list[float]:
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    return [line["loss"] for line in lines]


def close(name: str, other: str, tolerance: float) -> None:
    torch.testing.assert_close(losses(name), losses(other), rtol=tolerance, atol=0)
    for key, tensor in weights(other).items():
        torch.testing.assert_close(weights(name)[key], tensor, rtol=tolerance, atol=tolerance)


LAYOUTS = {
    "ddp": [(1, "single", 2), (2, "ddp", 4), (4, "ddp", 5), (3, "ddp", 7), (1, "single", 8)],
    "fsdp": [(1, "single", 2), (2, "fsdp", 4), (4, "fsdp", 5), (3, "fsdp", 7), (1, "single", 8)],
    "mixed": [(2, "fsdp", 3), (2, "ddp", 5), (3, "fsdp", 6), (1, "fsdp", 8)],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_a_run_goes_on_on_other_ranks(layouts: str, precision: str) -> None:
    what = [f"precision={precision}", "optimizer=sgd", "optimizer.lr=0.1", "clip=0"]
    run("name=whole", *what)
    for size, kind, stop in LAYOUTS[layouts]:
        in_ranks(size, run, "name=moved", *what, f"parallel={kind}", f"stop_at={stop}", "memory.microbatch=2")
    close("moved", "whole", TOLERANCE[precision])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("size", "kind"), [(2, "fsdp"), (3, "ddp"), (4, "fsdp")])
def test_the_same_ranks_go_on_to_the_bit(size: int, kind: str) -> None:
    what = [f"parallel={kind}", "model.dropout=0.1", "memory.microbatch=2"]
    in_ranks(size, run, "name=whole", *what)
    in_ranks(size, run, "name=halted", *what, "stop_at=3")
    in_ranks(size, run, "name=halted", *what)
    assert losses("halted") == losses("whole")
    assert all(torch.equal(weights("halted")[k], v) for k, v in weights("whole").items())


@pytest.mark.timeout(600)
def test_exact_sums_are_the_same_to_the_bit_on_any_ranks() -> None:
    what = ["deterministic=elastic", "model.dropout=0.1"]
    run("name=whole", *what)
    for size, stop in [(2, 2), (4, 4), (1, 5), (3, 8)]:
        in_ranks(size, run, "name=moved", *what, "parallel=ddp", f"stop_at={stop}")
    assert losses("moved") == losses("whole")
    assert all(torch.equal(weights("moved")[k], v) for k, v in weights("whole").items())
