"""A fault at every system call of a save: the previous or the new checkpoint loads, and nothing acknowledged is missing."""

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
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "ASYNCHRONOUS": str(request.param)}
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


def begin(
    folder: Path, fault: str = "none", at: int = 0, sticky: int = 0, log: str = "", victim: int = 0
) -> dict[str, Any]:
    how = {"fault": fault, "at": at, "sticky": sticky, "log": log, "victim": victim}
    return {"begin": {"folder": str(folder), **how}}


FAULTS = {"kill": 0, "torn": 0, "short": 1, "28": 0, "28 sticky": 1, "5": 0, "5 sticky": 1, "13": 0, "122": 1, "24": 0}


def survives(job: Job, tmp_path: Path, fault: str, ranks: int, victim: int) -> None:
    """Make every call of the save go wrong in turn, and see what can be gone on from."""
    calls = job(begin(tmp_path / "count", victim=victim), ranks, victim)["calls"]
    assert calls > (20 if victim == 0 else 3)
    for at in range(1, calls + 1):
        folder = tmp_path / f"run-{at}"
        witness = (victim + 1) % ranks
        outcome = job(begin(folder, fault.split()[0], at, FAULTS[fault], victim=victim), ranks, witness)
        assert "error" not in outcome, (at, outcome)
        killed = outcome["killed"][victim]
        assert killed == (fault in ("kill", "torn")), (at, outcome)
        assert fault != "short" or outcome["acknowledged"] == 3, (at, outcome)
        found = job({"resume": {"folder": str(folder)}}, 1 + at % ranks)
        assert "error" not in found, (at, outcome, found)
        assert found["whole"], (at, found)
        assert found["step"] in (2, 3), at
        assert found["step"] >= outcome.get("acknowledged", 2), (at, outcome, found)
        assert found["next"] == 4
        assert not [name for name in found["left"] if name.startswith((".tmp-", ".trash-"))], (at, found)


SYNCHRONOUS, ASYNCHRONOUS = 0, 1
BEHIND = ("kill", "torn", "28 sticky", "5")  # what is tried of a save in the background too


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("job", "fault"), [(SYNCHRONOUS, f) for f in FAULTS] + [(ASYNCHRONOUS, f) for f in BEHIND], indirect=["job"]
)
def test_a_fault_at_every_call(fault: str, job: Job, tmp_path: Path) -> None:
    survives(job, tmp_path, fault, ranks=1, victim=0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("job", "fault"),
    [(SYNCHRONOUS, "kill"), (SYNCHRONOUS, "28 sticky"), (ASYNCHRONOUS, "torn"), (ASYNCHRONOUS, "5")],
    indirect=["job"],
)
def test_a_fault_at_every_call_of_one_of_two_ranks(fault: str, victim: int, job: Job, tmp_path: Path) -> None:
    survives(job, tmp_path, fault, ranks=2, victim=victim)


@pytest.mark.parametrize("job", [SYNCHRONOUS, ASYNCHRONOUS], indirect=True)
def test_what_is_durable_when(job: Job, tmp_path: Path) -> None:
    """Every file is fsynced before the rename, the folder too, and the parent after it: what a power cut would test."""
    log = tmp_path / "calls"
    job(begin(tmp_path / "run", log=str(log)))
    calls = [line.split(" ", 1) for line in log.read_text().splitlines()]
    names = [(verb, Path(path).name) for verb, path in calls]
    commit = names.index(("rename", "step-0000000003"))
    opened = [path for verb, path in calls[:commit] if verb == "open" and "/.tmp-" in path]
    assert {Path(p).name for p in opened} == {
        "shard-00000-of-00001.safetensors",
        "train_state.json",
        "run.yaml",
        "tokenizer.json",
        "manifest.json",
    }
    for path in opened:
        verbs = [verb for verb, other in calls[:commit] if other == path]
        assert verbs[-1] == "fsync", f"{path} is written after its last fsync, or has none"
        assert verbs.count("fsync") == 1
    partial = str(Path(opened[0]).parent)
    inside = max(i for i, (_, path) in enumerate(calls[:commit]) if path.startswith(f"{partial}/"))
    assert ["fsync", partial] in calls[inside:commit]
    parent = str(tmp_path / "run" / "checkpoints")
    assert calls[commit + 1] == ["fsync", parent]
    removed = names.index(("rename", ".trash-step-0000000001"))
    assert removed > commit + 1
    assert calls[removed + 1] == ["fsync", parent]
    assert all(i > removed for i, (verb, _) in enumerate(calls) if verb in ("unlink", "rmdir"))
