"""Who asks the saver: jobs are done in a process that has everything imported already."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def saver(shim: Path) -> Iterator[Callable[..., Job]]:
    """Inside, `at(place, asynchronous=)` is what does jobs; the file system whose power may be cut is at `place`/disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.faults.saver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    counter = itertools.count()

    def at(place: Path, *, asynchronous: bool) -> Job:
        how = {"POWER_CUT": str(place / "disk"), "ASYNCHRONOUS": str(int(asynchronous))}

        def do(what: dict[str, Any], ranks: int = 1, of: int = 0) -> dict[str, Any]:
            """What rank `of` answered, and which ranks were killed."""
            answer, number = place / "answer", next(counter)
            for old in place.glob("answer.*"):
                old.unlink()
            meeting = str(place / f"meeting-{number}")
            job = {**what, "ranks": ranks, "answer": str(answer), "meeting": meeting, "environment": how}
            process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            outcome: dict[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            said = place / f"answer.{of}"
            return outcome | (json.loads(said.read_text()) if said.exists() else {})

        return do

    yield at
    process.stdin.close()
    process.wait()
    process.stdout.close()


def begin(
    folder: Path, fault: str = "none", at: int = 0, sticky: int = 0, log: str = "", victim: int = 0, wait_s: float = 0
) -> dict[str, Any]:
    """The job that saves steps 1 and 2, and then 3 with a fault."""
    how = {"fault": fault, "at": at, "sticky": sticky, "log": log, "victim": victim, "wait_s": wait_s}
    return {"begin": {"folder": str(folder), **how}}


def resume(folder: Path) -> dict[str, Any]:
    """The job that loads the newest, saves step 4, and says what was loaded."""
    return {"resume": {"folder": str(folder)}}
