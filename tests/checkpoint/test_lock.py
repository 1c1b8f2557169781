"""One process a run: however many start, whoever was killed, and when the folder goes from under it."""

import fcntl
import os
import random
from pathlib import Path

import pytest

from tests.checkpoint.starters import one_round
from tests.checkpoint.test_store import FACTS, save
from tests.conftest import SMALL
from tests.short_runs import write_corpus
from trainkit import build
from trainkit import run as runs
from trainkit.checkpoint import Checkpoint, SaveFailed, store
from trainkit.checkpoint.lock import NAME, RunLock
from trainkit.errors import UserError
from trainkit.trainer import Trainer


@pytest.mark.timeout(240)
def test_one_of_eight_starters_trains_and_a_killed_owner_is_no_obstacle(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.txt", 60, random.Random(0))
    one_round(tmp_path, "t", random.Random(0))


def test_whoever_lost_its_folder_saves_nothing_into_the_new_one() -> None:
    run = Path("run")
    with RunLock(run) as lock:
        mine = Checkpoint().build(run, higher_is_better=False, versions={}, check_owner=lock.check)
        mine.preflight(0)
        save(mine, 1)
        run.rename("moved")
        with RunLock(run) as other:
            theirs = Checkpoint().build(run, higher_is_better=False, versions={}, check_owner=other.check)
            theirs.preflight(0)
            with pytest.raises(SaveFailed, match="run was moved or removed while this process used it"):
                save(mine, 2)
            save(theirs, 7)
            assert [p.name for p in theirs.folder.iterdir()] == [store.step_name(7)]
        run.rename("too")
        with pytest.raises(SaveFailed, match="moved or removed"):
            save(mine, 2)  # where nothing is
    assert not run.exists()


def test_a_run_whose_folder_is_moved_stops_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.one_step

    def one_step(self: Trainer) -> None:
        if self.learner.step == 3:
            Path("runs/t").rename("runs/moved")
            Path("runs/t/checkpoints").mkdir(parents=True)  # as another process would make
        step(self)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    run = runs.composed([*SMALL, "checkpoint.every=1", "name=t"])
    with (
        pytest.raises(SaveFailed, match="moved or removed while this process used it"),
        build.trainer(run, Path("runs/t")) as trainer,
    ):
        trainer.fit()
    assert list(Path("runs/t/checkpoints").iterdir()) == []


def test_the_folder_is_looked_at_again_right_before_a_checkpoint_gets_its_name() -> None:
    looked = []

    def check() -> None:
        looked.append(len(looked))
        if len(looked) == 2:
            raise OSError(116, "gone")

    it = Checkpoint(asynchronous=False).build(Path("run"), higher_is_better=False, versions={}, check_owner=check)
    it.preflight(0)
    it.save(1, {}, {}, {}, facts=FACTS)
    (outcome,) = it.finished()
    assert str(outcome.error).endswith("gone")
    assert list(it.folder.iterdir()) == []


def test_a_lock_file_that_is_removed_while_it_is_opened_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not tries:
            Path("run", NAME).unlink()  # as a process does that finds a mistake before anything was done
            Path("run").rmdir()
        tries.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(Path("run")) as lock:
        assert len(tries) == 2
        lock.check()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            RunLock(Path("run")).__enter__()


def test_a_full_disk_keeps_nobody_from_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(Path("run")), pytest.raises(UserError, match="in use by another process"):
        RunLock(Path("run")).__enter__()
