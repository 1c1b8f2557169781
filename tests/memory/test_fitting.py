"""Memory that runs out: the step is done again with half the rows, and a run begins with as many as fit."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.conftest import SMALL, weights
from trainkit import build, fitting
from trainkit import run as runs
from trainkit.errors import RanOutError
from trainkit.fitting import _foreseen, _sizes, largest
from trainkit.learner import Learner
from trainkit.memory.room import Room, ran_out
from trainkit.models.decoder import Backbone

PLAIN = ["optimizer=sgd", "optimizer.lr=0.1", "clip=0", "precision=fp64", "data.batch=8", "evaluation.sample_tokens=0"]
forward = Backbone.forward
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def too_many(patch: pytest.MonkeyPatch, rows: int, error: Exception = GPU, *, where: str = "forward") -> list[int]:
    """More than `rows` rows at once are too many, in the last block's forward or in its backward. What was tried."""
    tried: list[int] = []

    def run_out(grad: torch.Tensor) -> None:
        raise error

    def limited(self: Backbone, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = forward(self, tokens, *args, **kwargs)
        if self.training:
            tried.append(len(tokens))
            if len(tokens) > rows and where == "forward":
                raise error
            if len(tokens) > rows:
                hidden.register_hook(run_out)
        return hidden

    patch.setattr(Backbone, "forward", limited)
    return tried


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [GPU, CPU, MemoryError("")], ids=["gpu", "cpu", "python"])
def test_the_step_is_done_again_with_half(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    whole = learner(*PLAIN)
    losses = [float(whole.train_step()["loss"]) for _ in range(3)]
    notes: list[str] = []
    tried = too_many(monkeypatch, 3, error, where=where)
    it = learner(*PLAIN)
    it.fitting.note = notes.append
    found = [float(it.train_step()["loss"]) for _ in range(3)]
    assert tried == [8, 4, *[2] * 12]  # found out once
    assert [n.split(" (")[0] for n in notes] == [f"warning: {n} rows at once are too many" for n in (8, 4)]
    assert found == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(weights(it), weights(whole), rtol=1e-9, atol=1e-12)


def test_in_the_second_microbatch_too(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first one added is not counted twice."""
    whole = learner(*PLAIN, "memory.microbatch=2")
    whole.train_step()
    calls: list[int] = []

    def second(self: Backbone, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(tokens))
        if calls == [4, 4]:
            raise GPU
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Backbone, "forward", second)
    it = learner(*PLAIN, "memory.microbatch=4")
    it.train_step()
    assert calls == [4, 4, 2, 2, 2, 2]
    assert torch.equal(weights(it), weights(whole))


def test_the_same_seed_drops_out_what_that_microbatch_drops_out(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = [*PLAIN, "model.dropout=0.3"]
    half = learner(*what, "memory.microbatch=4")
    half.train_step()
    too_many(monkeypatch, 4)
    it = learner(*what)
    it.train_step()
    assert torch.equal(weights(it), weights(half))


def test_what_is_no_want_of_memory_is_raised(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    too_many(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learner(*PLAIN).train_step()
    assert not ran_out(ValueError("CUDA error: out of memory"))
    assert ran_out(RuntimeError("CUDA error: out of memory"))


def test_one_row_that_is_too_many_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    too_many(monkeypatch, 0)
    run = runs.composed([*SMALL, *PLAIN, "memory=checkpoint", "name=a"])
    with build.trainer(run, Path("runs/a")) as trainer, pytest.raises(RanOutError) as stopped:
        trainer.fit()
    assert str(stopped.value) == (
        "not even one row at a time fits (tried to allocate 2.00 GiB): memory=offload_activations+stream hold less, any of them"
    )


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch before 2.13 has no way back")
@pytest.mark.parametrize("memory", ["stream", "stream+checkpoint+offload_activations"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_streamed_blocks_forget_a_pass_that_broke_off(monkeypatch: pytest.MonkeyPatch, memory: str, where: str) -> None:
    def learned(*overrides: str) -> list[torch.Tensor]:
        run = runs.composed([*SMALL, *PLAIN, f"memory={memory}", "memory.offload_activations.above_mb=0", *overrides])
        joined = build.ranks(run)
        try:
            it = build.learner(run, run.data.open(), joined)
            for _ in range(2):
                it.train_step()
            return [joined.whole(p.detach()).clone() for p in it.model.parameters()]
        finally:
            joined.leave()

    half = learned("memory.microbatch=2")
    too_many(monkeypatch, 2, where=where)
    real, forgotten = FSDPModule.reset_iter_state, []
    monkeypatch.setattr(FSDPModule, "reset_iter_state", lambda it: (forgotten.append(it), real(it)))
    assert all(torch.equal(a, b) for a, b in zip(learned("memory.microbatch=8"), half, strict=True))
    assert len(forgotten) == 2  # 8 rows, then 4


def halved_run(name: str, *overrides: str) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        build.trainer(runs.composed([*SMALL, *PLAIN, *overrides, f"name={name}"]), Path("runs") / name) as trainer,
    ):
        too_many(patch, 2)
        trainer.fit()


def test_a_run_that_goes_on_begins_with_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    what = ["tracking=jsonl+console", "memory.microbatch=4"]
    halved_run("a", *what, "stop_at=3")
    assert (
        "4 rows at once are too many (tried to allocate 2.00 GiB): the step is done again with 2"
        in capsys.readouterr().out
    )
    assert json.loads(Path("runs/a/microbatch.json").read_text())["rows"] == 2
    halved_run("a", *what, "stop_at=5")
    out = capsys.readouterr().out
    assert "too many" not in out
    assert "batch: 2 rows × 4 accumulated × 1 rank = 8" in out
    halved_run("a", *what[:1], "memory.microbatch=8")  # something else is asked for
    assert "8 rows at once are too many" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert [line["microbatch"] for line in lines] == [2] * 6
    trained = runs.composed([*SMALL, *PLAIN, "memory.microbatch=2", "name=whole"])
    with build.trainer(trained, Path("runs/whole")) as whole:
        whole.fit()
    losses = [json.loads(line)["loss"] for line in Path("runs/whole/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses


@pytest.mark.parametrize("content", ["{", "[1]", '{"rows": 0}', '{"rows": "2"}', ""])
def test_a_file_that_is_not_ours_is_passed_over(content: str) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/microbatch.json").write_text(content)
    run = runs.composed([*SMALL, *PLAIN, "name=a"])
    with build.trainer(run, Path("runs/a")) as trainer:
        assert trainer.learner.fitting.rows == 8


class Gauge:
    """A device on which a row takes 10 bytes beside 100, of which `free` are left."""

    free = 1000
    rows = 0

    def __init__(self, device: torch.device) -> None:
        """No device is asked."""

    def begin(self) -> None:
        Gauge.rows = 0

    def taken(self) -> int:
        return 100 + 10 * Gauge.rows


@pytest.mark.parametrize(("free", "found"), [(1000, 12), (205, 6), (150, 3), (50, 1)])
@pytest.mark.parametrize("start", [None, 1, 5, 12])
def test_auto_is_the_largest_that_fits(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch, free: int, found: int, start: int | None
) -> None:
    monkeypatch.setattr(Gauge, "free", free)
    monkeypatch.setattr(fitting, "Room", Gauge)
    monkeypatch.setattr(fitting, "_moments_to_come", lambda it: 0)
    monkeypatch.setattr(fitting, "_gradients", lambda it: 100)
    tried = too_many(monkeypatch, 99)
    rehearse = Learner.rehearse
    monkeypatch.setattr(Learner, "rehearse", lambda it, rows: (setattr(Gauge, "rows", rows), rehearse(it, rows)))
    it = learner(*PLAIN, "data.batch=12")
    before, state = weights(it).clone(), torch.get_rng_state()
    assert largest(it, start=start) == found
    assert torch.equal(weights(it), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in it.parameters)
    assert not it.optimizer.state
    if start is None:  # nothing is tried that is foreseen not to fit
        assert max(tried) == found
        assert tried[:2] == [1, 1]  # two microbatches: the second one meets the first one's gradients


def test_auto_survives_what_runs_out(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gauge, "free", 10**9)
    monkeypatch.setattr(fitting, "Room", Gauge)
    tried = too_many(monkeypatch, 3)
    assert largest(learner(*PLAIN, "data.batch=12")) == 3
    assert largest(learner(*PLAIN, "data.batch=12"), start=12) == 3
    assert max(tried) == 12


def test_room_is_left_for_moments_that_are_not_made_yet(learner: Callable[..., Learner]) -> None:
    it = learner()
    size = 2 * sum(p.nbytes for p in it.parameters)
    assert fitting._moments_to_come(it) == size
    it.train_step()
    assert fitting._moments_to_come(it) == 0


def test_a_run_finds_its_microbatch_and_remembers_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = ["tracking=console", "memory.microbatch=auto"]
    monkeypatch.setattr(Gauge, "free", 10**9)
    monkeypatch.setattr(fitting, "Room", Gauge)
    tried = too_many(monkeypatch, 99)
    for stop in ("3", "5"):
        run = runs.composed([*SMALL, *PLAIN, *what, "name=a", f"stop_at={stop}"])
        with build.trainer(run, Path("runs/a")) as trainer:
            trials = len(tried)
            trainer.fit()
        tried.clear()
        assert "batch: 8 rows × 1 accumulated" in capsys.readouterr().out
    assert trials == 0  # the second time it is known
    assert json.loads(Path("runs/a/microbatch.json").read_text())["asked"] == "auto"


def test_sizes_halve_and_what_a_row_takes_is_foreseen() -> None:
    assert list(_sizes(12)) == [1, 2, 3, 6, 12]
    assert list(_sizes(1)) == [1]
    assert list(_sizes(8)) == [1, 2, 4, 8]
    assert _foreseen({1: 110, 2: 120}, 4, 0) == 140
    assert _foreseen({1: 110}, 2, 100) == 120
    assert _foreseen({1: 110}, 2, 500) == 110


def test_the_memory_of_a_process_is_measured() -> None:
    room = Room(torch.device("cpu"))
    assert 1 << 28 < room.free < 1 << 45
    room.begin()
    some = torch.ones(40 << 20)
    assert room.taken() > 150 << 20
    del some
    room.begin()
    assert room.taken() < 50 << 20


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from trainkit import build
from trainkit import run as runs
run = runs.composed(sys.argv[1:])
with build.trainer(run, Path("runs") / run.name) as trainer:
    size = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
    trainer.fit()
"""


def test_a_process_that_may_hold_no_more_goes_on_with_less() -> None:
    what = [
        *SMALL,
        "name=limited",
        "model.width=256",
        "model.context=256",
        "data.length=256",
        "data.batch=32",
        "steps=2",
    ]
    what += ["data.path=long.txt", "schedule.warmup=0", "tracking=console", "evaluation.sample_tokens=0"]
    Path("long.txt").write_text("".join(f"{i} bottles of beer on the wall, take one down. " for i in range(2000)))
    command = [sys.executable, "-c", LIMITED, *what, "checkpoint.asynchronous=false", "evaluation.batches=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"32 rows at once are too many \(tried to allocate \d+ bytes\)", done.stdout), done.stdout
    assert "saved step 2" in done.stdout
