"""A process that saves under the shim, shared by the tests of faults."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
Job = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def job(shim: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """Do a job in a process that has everything imported already; what it answered, or that it was killed."""
    how = {"ASYNCHRONOUS": str(request.param), "POWER_CUT": str(tmp_path / "disk")}
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", **how}
    saver = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.faults.saver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[2],
        env=environment,
    )
    assert saver.stdin is not None
    assert saver.stdout is not None
    counter = itertools.count()

    def do(what: dict[str, Any], ranks: int = 1, of: int = 0) -> dict[str, Any]:
        """What rank `of` answered, and which ranks were killed."""
        answer, number = tmp_path / "answer", next(counter)
        for old in tmp_path.glob("answer.*"):
            old.unlink()
        job = {**what, "ranks": ranks, "answer": str(answer), "meeting": str(tmp_path / f"meeting-{number}")}
        saver.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        saver.stdin.flush()  # type: ignore[union-attr]
        outcome: dict[str, Any] = json.loads(saver.stdout.readline())  # type: ignore[union-attr]
        said = tmp_path / f"answer.{of}"
        return outcome | (json.loads(said.read_text()) if said.exists() else {})

    yield do
    saver.stdin.close()
    saver.wait()
    saver.stdout.close()
