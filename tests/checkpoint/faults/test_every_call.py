"""A fault at every system call of a save: the previous or the new checkpoint loads, and nothing acknowledged is missing."""

import errno
from pathlib import Path

import pytest

from tests.checkpoint.faults.client import Job, begin, resume

ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE]
FAULTS = {"kill": 0, "torn": 0, "short": 0, "short from there on": 1, str(errno.EACCES): 0}
FAULTS |= {f"{number}{how}": int(how != "") for number in ERRORS for how in ("", " from there on")}
ENOSPC_STAYS, EIO = f"{errno.ENOSPC} from there on", str(errno.EIO)


def survives(job: Job, tmp_path: Path, fault: str, ranks: int, victim: int) -> None:
    """Make every call of the save go wrong in turn, and see what can be gone on from."""
    calls = job(begin(tmp_path / "count", victim=victim), ranks, victim)["calls"]
    assert calls > (20 if victim == 0 else 3)
    failed = 0
    for at in range(1, calls + 1):
        folder = tmp_path / f"run-{at}"
        witness = (victim + 1) % ranks
        outcome = job(begin(folder, fault.split()[0], at, FAULTS[fault], victim=victim), ranks, witness)
        assert "error" not in outcome, (at, outcome)
        killed = outcome["killed"][victim]
        assert killed == (fault in ("kill", "torn")), (at, outcome)
        # a write that is short is gone on with; a save that failed is tried again once the disk is well
        assert killed or outcome["acknowledged"] == 3, (at, outcome)
        failed += "failed" in outcome
        found = job(resume(folder), 1 + at % ranks)
        assert "error" not in found, (at, outcome, found)
        assert found["whole"], (at, found)
        assert found["step"] in (2, 3), at
        assert found["step"] >= outcome.get("acknowledged", 2), (at, outcome, found)
        assert found["next"] == 4
        assert not [name for name in found["left"] if name.startswith((".tmp-", ".trash-"))], (at, found)
    assert failed > calls // 3 or not fault.split()[0].isdigit(), "the error was not heard of"


SYNCHRONOUS, ASYNCHRONOUS = 0, 1
BEHIND = ("kill", "torn", ENOSPC_STAYS, EIO)  # what is tried of a save in the background too


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
    [(SYNCHRONOUS, "kill"), (SYNCHRONOUS, ENOSPC_STAYS), (ASYNCHRONOUS, "torn"), (ASYNCHRONOUS, EIO)],
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
