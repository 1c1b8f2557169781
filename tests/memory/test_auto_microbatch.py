"""A run begins with as many rows at once as fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, weights
from tests.memory.out_of_memory import PLAIN, too_many
from trainkit import build, fitting
from trainkit import run as runs
from trainkit.fitting import _foreseen, _sizes, largest
from trainkit.learner import Learner
from trainkit.memory.room import Room


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
    what = ["tracking=console", "memory=checkpoint", "memory.checkpoint.every=2", "memory.microbatch=auto"]
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
    known = json.loads(Path("runs/a/microbatch.json").read_text())
    assert known["asked"] == "auto"
    assert "every=2" in known["memory"]  # all that is said of a strategy, for another of its kind takes other memory


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
