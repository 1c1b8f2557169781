"""Which checkpoints stay, against the words of the documentation taken one by one."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.test_store import save, saver
from trainkit.checkpoint import SaveFailed, store
from trainkit.checkpoint.lock import RunLock
from trainkit.checkpoint.retention import Kept, over_budget, tiers
from trainkit.errors import UserError

metrics = st.none() | st.floats(-3, 3) | st.just(math.nan)
checkpoints = st.dictionaries(st.integers(1, 40), st.tuples(metrics, st.booleans()), min_size=1).map(
    lambda found: [Kept(step, metric, end) for step, (metric, end) in sorted(found.items())]
)


@given(checkpoints, st.integers(2, 5), st.booleans(), st.integers(0, 3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_tiers(saved: list[Kept], keep: int, epochs: bool, best: int, higher: bool) -> None:
    belongs = tiers(saved, keep=keep, epochs=epochs, best=best, higher_is_better=higher)
    steps = sorted(k.step for k in saved)
    assert set(belongs) == set(steps)
    for kept in saved:
        its = belongs[kept.step]
        newer = sum(step > kept.step for step in steps)
        assert ("latest" in its) == (newer == 0)
        assert ("backup" in its) == (newer == 1)
        assert ("rolling" in its) == (newer < keep)
        assert ("epoch" in its) == (epochs and kept.epoch_end)
        measured = kept.metric is not None and not math.isnan(kept.metric)
        ahead = 0
        for other in saved:
            if other.metric is None or math.isnan(other.metric) or not measured or other is kept:
                continue
            assert kept.metric is not None
            better = other.metric > kept.metric if higher else other.metric < kept.metric
            ahead += better or (other.metric == kept.metric and other.step < kept.step)
        assert ("best" in its) == (measured and ahead < best)


def test_one_of_every_so_many_hours_of_training_stays() -> None:
    saved = [Kept(step, None, False, seconds=1800.0 * step) for step in range(1, 13)]
    belongs = tiers(saved, keep=2, epochs=False, best=0, higher_is_better=False, hours=2)
    assert [step for step, its in sorted(belongs.items()) if "hours" in its] == [1, 4, 8, 12]
    assert not any(
        "hours" in its for its in tiers(saved, keep=2, epochs=False, best=0, higher_is_better=False).values()
    )


def test_a_budget_takes_the_cheapest_first_and_never_the_newest_two() -> None:
    saved = [
        Kept(1, 1.0, False, 0.0, size=10),  # hours, and the best
        Kept(2, None, True, 10.0, size=10),  # epoch
        Kept(3, None, False, 7300.0, size=10),  # hours
        Kept(4, None, False, 7400.0, size=10),  # rolling
        Kept(5, None, False, 7500.0, size=10),  # rolling
        Kept(6, None, False, 7600.0, size=10),
        Kept(7, None, False, 7700.0, size=10),
    ]
    belongs = tiers(saved, keep=4, epochs=True, best=1, higher_is_better=False, hours=2)
    for budget, gone in {
        70: [],
        69: [4],
        50: [4, 5],
        40: [4, 5, 3],
        30: [4, 5, 3, 2],
        20: [4, 5, 3, 2, 1],
        0: [4, 5, 3, 2, 1],
    }.items():
        assert over_budget(saved, belongs, budget) == gone


def test_a_budget_of_the_disk_is_kept() -> None:
    it = saver(keep=5, keep_best=0, max_gb=1e-9)
    for step in range(1, 6):
        save(it, step)
    assert [p.name for p in sorted(it.folder.iterdir())] == ["step-0000000004", "step-0000000005"]


def test_what_is_kept_beyond_the_newest_two_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    it = saver(keep=5, keep_best=0)
    for step in range(1, 6):
        save(it, step)
    free = [10]
    real = shutil.rmtree

    def removed(path: Path) -> None:
        free[0] += 1 << 20
        real(path)

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(shutil, "rmtree", removed)
    save(it, 6)
    assert "step-0000000001" not in {p.name for p in it.folder.iterdir()}
    assert {"step-0000000005", "step-0000000006"} <= {p.name for p in it.folder.iterdir()}
    free[0] = -(1 << 40)
    with pytest.raises(SaveFailed, match="are free and it takes"):
        save(it, 7)
    assert {"step-0000000005", "step-0000000006"} <= {p.name for p in it.folder.iterdir()}


@pytest.mark.parametrize("pack", [["model"], ["optimizer"], ["model", "optimizer"]])
def test_packed_shards_come_back_to_the_bit(pack: list[str]) -> None:
    import torch

    content = {
        "model.w": torch.randn(300, 50),
        "optimizer.w.exp_avg": torch.zeros(300, 50),
        "random.torch": torch.ones(3),
    }
    path = save(saver(pack=pack), 1, content)
    zipped = [p.name for p in path.iterdir() if p.name.endswith(".zst")]
    assert len(zipped) == 1
    found = store.load(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in content.items())
    file = path / zipped[0]
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 50)):
        bad = bytearray(whole)
        bad[at] ^= 1
        file.write_bytes(bad)
        with pytest.raises(store.BadCheckpoint):
            store.load(path)


def test_what_no_tier_keeps_is_removed() -> None:
    it = saver(keep=2, keep_best=1, keep_epochs=True)
    for step, metric, end in [(1, 3.0, False), (2, 1.0, False), (3, 2.0, True), (4, None, False), (5, 2.0, False)]:
        save(it, step, metric=metric, epoch_end=end)
    assert sorted(p.name for p in it.folder.iterdir()) == [f"step-{s:010d}" for s in (2, 3, 4, 5)]


def test_a_removal_that_fails_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    it = saver(keep=2, keep_best=0)
    save(it, 1)
    save(it, 2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as stubborn:
        stubborn.setattr(shutil, "rmtree", refuse)
        save(it, 3)
    assert "could not be removed: Permission denied" in it.notes[0]
    saver(keep=2, keep_best=0)
    assert sorted(p.name for p in it.folder.iterdir()) == ["step-0000000002", "step-0000000003"]


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    with RunLock(Path("run")), pytest.raises(UserError, match=f"the run run is in use by process {os.getpid()} on "):
        RunLock(Path("run")).__enter__()
    with RunLock(Path("run")):
        pass


def test_a_mistake_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunLock(Path("new/run")):
        raise UserError("found early")
    assert not Path("new").exists()
    Path("new/run").mkdir(parents=True)
    with pytest.raises(UserError), RunLock(Path("new/run")):
        raise UserError("found in a folder that was there")
    Path("new/run/run.yaml").touch()
    assert Path("new/run/run.yaml").exists()
