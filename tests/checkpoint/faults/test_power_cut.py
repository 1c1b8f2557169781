"""The power is cut at every system call of a save, and right after it was acknowledged, on a file system of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faults.conftest import Job
from tests.checkpoint.faults.test_every_call import ASYNCHRONOUS, SYNCHRONOUS, begin

MIB = 48


class Disk:
    """An ext4 file system in a file, mounted at `folder`."""

    def __init__(self, place: Path) -> None:
        self.image, self.folder = place / "image", place / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True, capture_output=True)

    def mount(self) -> None:
        done = subprocess.run(["mount", "-o", "loop", self.image, self.folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount does not work here: {done.stderr.strip()}")

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("a file system to cut the power of takes root and mkfs.ext4")
    it = Disk(tmp_path)
    it.mount()
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
        disk.unmount()
        disk.mount()
        found[at] = job({"resume": {"folder": str(folder)}})
        assert "error" not in found[at], (at, found[at])
        assert found[at]["whole"], (at, found[at])
        assert found[at]["step"] in (2, 3), at
        assert found[at]["next"] == 4
        shutil.rmtree(folder)
    assert found[calls + 1]["step"] == 3
    assert found[1]["step"] == 2
