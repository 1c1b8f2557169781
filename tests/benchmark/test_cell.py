"""One cell in this process: what it learns, what it takes, and how it says that it ended badly."""

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.benchmark import cell
from trainkit.errors import UserError
from trainkit.tasks.causal_lm import CausalLM

ALL = [*SMALL, "optimizer=adamw", "name=t"]


def measure(*overrides: str, memory: bool = True, warmup: int = 1, steps: int = 2) -> dict[str, Any]:
    spec = {"overrides": [*ALL, *overrides], "config_dir": None, "warmup": warmup, "steps": steps, "memory": memory}
    return cell.measure(spec)


def test_a_cell_learns_what_the_same_steps_learn() -> None:
    found = measure()
    run = runs.composed(ALL)
    it = build.learner(run, run.data.open(), build.ranks(run))
    losses = [float(it.train_step()["loss"]) for _ in range(4)]
    assert [*found["losses"], found["loss"]] == losses
    assert (found["steps"], found["tokens_per_step"], found["parameters"]) == (2, 4 * 32, run.model.parameters())
    assert found["flops_per_token"] == run.model.flops_per_token(32)
    assert found["seconds"] > 0
    assert found["peak_flops"] > 1e8
    assert len(found["data"]) == 64
    assert not Path("runs").exists()
    json.dumps(found, allow_nan=False)


def test_memory_is_that_of_a_whole_step_by_category() -> None:
    many = ["model.depth=4", "data.batch=8"]
    baseline, less = measure(*many), measure(*many, "memory=checkpoint")
    here, there = baseline["memory"], less["memory"]
    assert sum(here["by_category"].values()) == here["peak"] == max(p["peak"] for p in here["by_phase"].values())
    assert here["by_category"]["optimizer"] >= 8 * baseline["parameters"]  # two moments in float32, kept between steps
    assert there["by_category"]["activations"] < 0.5 * here["by_category"]["activations"]
    assert less["losses"] == baseline["losses"]
    assert set(here["by_phase"]) >= {"forward", "backward", "optimizer"}
    assert baseline["peak_rss_growth_bytes"] >= 0


def test_what_is_not_asked_for_is_not_followed() -> None:
    assert not {"memory", "loss"} & set(measure(memory=False, warmup=0, steps=1))


def test_choices_of_a_persons_own_reach_the_process(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("kind: decoder\nvocab: 320\nwidth: 8\ndepth: 1\ncontext: 32\n"
                                                  "attention: {heads: 1}\nmlp: {activation: gelu}\n")  # fmt: skip
    words = ["data=text", "data.path=corpus", "data.length=32", "data.batch=4", "data.validation=0.2", "model=mine"]
    spec = {"overrides": words, "config_dir": str(tmp_path), "warmup": 0, "steps": 1, "memory": False}
    assert cell.measure(spec)["parameters"] < 10_000


def in_two() -> None:
    words = [*ALL, "parallel=ddp", "data.batch=4"]
    spec = {"overrides": words, "config_dir": None, "warmup": 1, "steps": 1, "memory": True}
    found = cell.measure(spec)
    alone = [float(line) for line in Path("alone").read_text().split()]
    assert [*found["losses"], found["loss"]] == pytest.approx(alone, rel=1e-5)
    assert found["tokens_per_step"] == 4 * 32
    assert not torch.distributed.is_initialized()


def test_ranks_measure_one_run_together() -> None:
    alone = measure(steps=1)
    Path("alone").write_text(" ".join(map(str, [*alone["losses"], alone["loss"]])))
    in_ranks(2, in_two)


def too_much() -> Exception:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    return found.value


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (too_much(), "oom", "DefaultCPUAllocator: can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom", "CUDA out of memory"),
        (MemoryError(), "oom", ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom", "CUBLAS"),
        (OSError(12, "Cannot allocate memory"), "oom", "Cannot allocate memory"),
        (UserError("8bit cannot\nbe"), "refused", "8bit cannot be"),
        (RuntimeError("shapes do not fit"), "failed", "RuntimeError: shapes do not fit"),
        (KeyError("out of memory"), "failed", "KeyError"),
    ],
)
def test_every_error_is_a_result(error: Exception, status: str, said: str) -> None:
    found = cell.ended(error)
    assert found["status"] == status
    assert said in found["error"]
    assert "\n" not in found["error"]


def test_a_cell_writes_down_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "_end_with_whoever_started_this", lambda: None)
    monkeypatch.setattr(cell, "_first_to_go", lambda: None)
    spec = {"overrides": ALL, "config_dir": None, "warmup": 0, "steps": 1, "memory": False}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    monkeypatch.setenv("RANK", "3")
    cell.main(tmp_path)
    assert json.loads((tmp_path / "rank-0003.json").read_text())["status"] == "ok"

    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cell.build, "learner", no_room)
    with pytest.raises(SystemExit) as left:
        cell.main(tmp_path)
    assert left.value.code == 1
    assert json.loads((tmp_path / "rank-0003.json").read_text())["status"] == "oom"


def test_a_batch_that_does_not_fit_is_not_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another cell: what was asked for runs out of memory, and that is the result."""

    def small_room(self: CausalLM, *args: Any, microbatch: int, **more: Any) -> Any:
        if microbatch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, *args, microbatch=microbatch, **more)

    backward = CausalLM.backward
    monkeypatch.setattr(CausalLM, "backward", small_room)
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        measure("data.batch=4")
    assert measure("data.batch=4", "memory.microbatch=2")["steps"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_growth_is_the_peak_beyond_the_start() -> None:
    def hold(size: int) -> None:
        with mmap.mmap(-1, size) as memory:  # which goes back to the system, and does not come from what malloc keeps
            for _ in range(size >> 20):
                memory.write(b"1" * (1 << 20))

    size = 64 << 20
    hold(size)  # a peak that is over does not count
    resident = cell.PeakResident()
    hold(size // 2)
    assert size // 2 <= resident.growth() + (4 << 20) < size
