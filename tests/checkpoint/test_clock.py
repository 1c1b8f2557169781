"""A wall clock that jumps: it decides nothing. Order is by step, hours are of training, waiting is by the monotonic clock."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.faults import shim
from tests.checkpoint.test_store import save, saver
from tests.conftest import SMALL
from trainkit.checkpoint import find, load, store
from trainkit.launch import policy
from trainkit.trainer import Trainer
from trainkit.watchdog import Watchdog

DAY = 86400.0
RUNS = Path("runs")


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.monotonic() + 1.7e9 + seconds
    monkeypatch.setattr(time, "time", lambda: now)


@pytest.mark.parametrize("jumps", [[0, DAY, 0, DAY], [0, -DAY, -2 * DAY, 0], [0, -1, -2, -3], [0, 3600, 0, -3600]])
def test_order_and_retention_do_not_look_at_the_clock(monkeypatch: pytest.MonkeyPatch, jumps: list[float]) -> None:
    it = saver(RUNS / "t", keep=2, keep_best=0, keep_hours=2)
    for step in range(1, 13):
        set_clock(monkeypatch, jumps[step % 4])
        save(it, step, seconds=1800.0 * step)
    assert [p.name for p in sorted(it.folder.iterdir())] == [store.step_name(s) for s in (1, 4, 8, 11, 12)]
    found = it.load_latest()
    assert found is not None
    assert found.step == 12
    assert find.resolve("t", RUNS, policy).name == store.step_name(12)
    times = [manifest.time for _, manifest in store.whole(it.folder)]
    assert times == sorted(times)


@pytest.mark.parametrize("back", [DAY, 3600.0, 1.0])
def test_the_newest_run_is_the_one_that_saved_last(monkeypatch: pytest.MonkeyPatch, back: float) -> None:
    set_clock(monkeypatch, 0)
    save(saver(RUNS / "first"), 1)
    set_clock(monkeypatch, -back)
    it = saver(RUNS / "second")
    save(it, 1)
    assert find.resolve("latest", RUNS, policy).parents[1].name == "second"
    set_clock(monkeypatch, -2 * back)
    save(saver(RUNS / "first"), 2)
    assert find.resolve("latest", RUNS, policy).parents[1].name == "first"


def test_a_checkpoint_from_the_far_future_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 9000 * DAY)
    save(saver(RUNS / "first"), 1)
    set_clock(monkeypatch, 0)
    path = save(saver(RUNS / "second"), 1)
    assert store.inspect(path).time == time.time()


def test_the_watchdog_does_not_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    with Watchdog(Path("t"), 0, 2.0) as dog:
        for step in range(30):
            set_clock(monkeypatch, random.Random(step).choice([DAY, -DAY, 0.0]))
            dog.beat(step)
            time.sleep(0.01)
    assert json.loads(Path("t/heartbeat.json").read_text())["phase"] == "ended"


@pytest.mark.timeout(120)
def test_a_run_under_a_clock_that_jumps_is_the_same_run(tmp_path: Path, trained: Callable[..., Trainer]) -> None:
    library = shim.build(tmp_path, Path(__file__).parent / "clock.c")
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    what = ["steps=12", "checkpoint.every=3", "checkpoint.keep=2", "evaluation.every=4", "guard.hang_s=60"]
    trained(*what, name="whole")
    for end in (7, 12):
        words = [sys.executable, "-m", "trainkit", "train", *SMALL, *what, "name=jumps", f"stop_at={end}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
        done = subprocess.run(words, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
    ours, theirs = (load(find.resolve(name, RUNS, policy)) for name in ("jumps", "whole"))
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    kept = [[p.name for p in store.folders(RUNS / name / "checkpoints")] for name in ("jumps", "whole")]
    assert kept[0] == kept[1]
