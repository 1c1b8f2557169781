"""Memory that runs out: the step is done again with half the rows, and a run begins with as many as fit."""

import json
import os
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
from tests.memory.out_of_memory import CPU, GPU, PLAIN, forward, too_many
from trainkit import build
from trainkit import run as runs
from trainkit.errors import RanOutError
from trainkit.learner import Learner
from trainkit.memory.room import ran_out
from trainkit.models.decoder import Backbone


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
        "not even one row at a time fits (tried to allocate 2.00 GiB): "
        "memory=offload_activations+offload_optimizer+stream+8bit hold less, any of them"
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
    one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # else every thread reserves 64 MiB of addresses for itself
    done = subprocess.run(command, capture_output=True, text=True, env=one_arena)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"32 rows at once are too many \(tried to allocate \d+ bytes\)", done.stdout), done.stdout
    assert "saved step 2" in done.stdout
