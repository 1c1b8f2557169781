"""The power is cut at every system call of a save, and at once or later after it was acknowledged, on file systems of their
own. `scripts/power_cuts` waits longer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faults.client import Job, begin, resume
from tests.checkpoint.faults.disk import MIB, Disk, NoDisk
from tests.checkpoint.faults.test_every_call import ASYNCHRONOUS, SYNCHRONOUS


@pytest.fixture(params=MIB)
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    try:
        it = Disk(tmp_path, request.param)
    except NoDisk as why:
        pytest.skip(str(why))
    yield it
    it.unmount()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("job", [SYNCHRONOUS, ASYNCHRONOUS], indirect=True)
def test_what_was_acknowledged_outlives_a_power_cut(job: Job, disk: Disk) -> None:
    calls = job(begin(disk.folder / "count"))["calls"]
    found = {}
    for at in range(1, calls + 2):  # the last one is after all calls: right after the save was acknowledged
        folder = disk.folder / f"run-{at}"
        outcome = job(begin(folder, "cut", at))
        assert outcome["killed"] == [True], (at, outcome)
        disk.again()
        found[at] = job(resume(folder))
        assert "error" not in found[at], (at, found[at])
        assert found[at]["whole"], (at, found[at])
        assert found[at]["step"] in (2, 3), at
        assert found[at]["next"] == 4
        shutil.rmtree(folder)
    assert found[calls + 1]["step"] == 3
    assert found[1]["step"] == 2
    outcome = job(begin(disk.folder / "later", "cut", calls + 1, wait_s=1.0))
    assert outcome["killed"] == [True], outcome
    disk.again()
    later = job(resume(disk.folder / "later"))
    assert (later["step"], later["whole"], later["next"]) == (3, True, 4)
