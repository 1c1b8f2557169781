"""Ranks as real processes: what they say to each other, who fails, who is slow, who is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.forked import Process
from tests.rank_server import Server
from tests.ranks import in_ranks
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load
from trainkit.errors import UserError
from trainkit.parallel import ElsewhereError, Parallel, straggler
from trainkit.trainer import Trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def words() -> None:
    group = Parallel(kind="ddp", device="cpu").join(torch.device("cpu")).host
    assert group.gather({"rank": group.rank, "text": "é" * group.rank}) == [
        {"rank": 0, "text": ""},
        {"rank": 1, "text": "é"},
        {"rank": 2, "text": "éé"},
    ]
    assert group.max(group.rank * 10) == 20
    assert group.first_does(lambda: group.rank + 5) == 5

    def fails() -> None:
        if group.rank == 1:
            raise UserError("a mistake")

    with pytest.raises((UserError, ElsewhereError)) as found:
        group.all_do(fails)
    assert isinstance(found.value, UserError if group.rank == 1 else ElsewhereError)
    assert found.value.exit_code == 2  # type: ignore[union-attr]
    assert "a mistake" in str(found.value)


def test_what_one_rank_says_all_hear() -> None:
    in_ranks(3, words)


def test_a_straggler_is_far_beyond_the_median() -> None:
    assert straggler([1.0, 1.1, 1.0]) is None
    assert straggler([1.0, 2.0, 1.0]) == (1, 2.0)
    assert straggler([1e-5, 9e-5]) is None  # too short to matter


def slow() -> None:
    run = runs.composed([*SMALL, "name=slow", "parallel=ddp", "tracking=jsonl+console"])
    with build.trainer(run, Path("runs/slow")) as trainer:
        notes: list[str] = []
        trainer.trackers.note = notes.append
        if not trainer.learner.ranks.first:
            real = trainer.learner.loader.at
            trainer.learner.loader.at = lambda step: (time.sleep(0.1), real(step))[1]  # type: ignore[method-assign]
        trainer.fit()
        if trainer.learner.ranks.first:
            assert sum("rank 1 takes" in note for note in notes) == 1, notes


def test_a_slow_rank_is_named_once() -> None:
    in_ranks(2, slow)


def stopped_by_one() -> None:
    run = runs.composed([*SMALL, "name=s", "parallel=ddp", "steps=50"])
    step = Trainer.one_step

    def one_step(self: Trainer) -> None:
        step(self)
        if self.learner.step == 5 and self.learner.ranks.rank == 1:
            self.signals.asked = "SIGTERM"

    Trainer.one_step = one_step  # type: ignore[method-assign]
    with build.trainer(run, Path("runs/s")) as trainer:
        assert trainer.fit() in ("SIGTERM", "a signal to another rank")
        assert trainer.learner.step == 5


def test_all_stop_at_the_step_at_which_one_is_asked() -> None:
    in_ranks(2, stopped_by_one)
    assert load(find.resolve("s", Path("runs"), launch.policy)).step == 5


def trains(server: Server, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Under torch's own torchrun; its ranks are forked."""
    return subprocess.Popen(
        [*TORCHRUN, f"--max-restarts={restarts}", "--no-python", str(server.program), "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(*words: str) -> None:
    run = runs.composed([*words])
    with build.trainer(run, Path("runs") / run.name) as trainer:
        trainer.fit()


@pytest.mark.timeout(600)
def test_a_killed_rank_is_restarted_by_torchrun_and_nothing_is_lost(server: Server) -> None:
    what = [*SMALL, "parallel=ddp", "steps=40", "checkpoint.every=5"]
    in_ranks(2, train, *what, "name=whole")
    killed = trains(server, *what, "name=killed", restarts=2)
    checkpoints = Path("runs/killed/checkpoints")
    while not checkpoints.exists() or not list(checkpoints.glob("step-*")):
        time.sleep(0.05)
        assert killed.poll() is None, killed.communicate()[0]
    ranks = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    said = killed.communicate()[0]
    assert killed.returncode == 0, said
    assert "rank 1 does not answer any more" in said
    ours, theirs = (load(find.resolve(name, Path("runs"), launch.policy)).tensors for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.timeout(600)
def test_a_mistake_under_torchrun_is_said_once(server: Server) -> None:
    run = trains(server, *SMALL, "parallel=ddp", "data.batch=5", "name=x")
    said = run.communicate()[0]
    assert run.returncode != 0
    assert said.count("trainkit: data.batch=5 rows do not divide over 2 ranks") == 1, said
    assert "Traceback" not in said.split("torch/distributed")[0]


def resident(which: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) << 10


def measured(words: list[str], said: str, folder: str) -> None:
    os.chdir(folder)
    before = resident("VmRSS")
    train(*words)
    Path(said).write_text(str(resident("VmHWM") - before))
    os._exit(0)


def most(*words: str) -> int:
    """Bytes that a run takes in a process of its own, beside what the process has before it."""
    process = Process(target=measured, args=(list(words), "said", os.getcwd()))
    process.start()
    process.join()
    assert process.exitcode == 0
    return int(Path("said").read_text())


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_resuming_takes_no_more_memory_than_training(asynchronous: str) -> None:
    what = [*SMALL, "name=m", "model.width=512", "model.depth=6", "model.vocab=8192", "memory.microbatch=1"]
    what += [f"checkpoint.asynchronous={asynchronous}", "evaluation.sample_tokens=0"]
    state = 12 * (8192 * 512 + 6 * 12 * 512 * 512)
    trained = most(*what, "stop_at=3")
    resumed = most(*what, "stop_at=5")
    assert state < trained < 4 * state  # so that it is the state that is measured
    assert resumed < trained + 0.1 * state  # a copy of the weights alone would be a third
