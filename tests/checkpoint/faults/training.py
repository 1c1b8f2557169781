"""Ranks that train for real under the shim, one of which is killed or stopped at a system call of its part of a save.

`Training` is for tests and scripts; run as a program, it is the process that has everything imported and forks the ranks.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import free_port
from tests.short_runs import SMALL, difference, end_of

RANKS, FAULTY = 4, 4  # the step whose save goes wrong
WIDE = ["model.width=128", "evaluation.batches=2"]  # so that every rank has something to write
WHAT = [*SMALL, *WIDE, "parallel=ddp", "steps=6", "checkpoint.every=2", "checkpoint.keep_best=0"]
MOST_S = 60.0  # within which all others have to be gone


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended: exit codes (negative: the signal), the calls of the victim's part of the save, whether one of
    them was made to go wrong, and how long the others went on after that."""

    codes: list[int]
    calls: int
    happened: bool
    seconds: float


class Training:
    """Inside `with`, ranks can be started in `folder`."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self._shim, self._folder = shim, folder
        self.slowest = 0.0  # seconds that the others went on after a fault, at most

    def __enter__(self) -> "Training":
        root = Path(__file__).parents[3]
        how = {"LD_PRELOAD": str(self._shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.faults.training"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env={**os.environ, **how},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def train(self, name: str, *how: str, fault: str = "", at: int = 0, victim: int = 0) -> Outcome:
        """Train the run `name` on four ranks, to the end or to the fault: `kill` or `stop` at call `at`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        hang = ["guard.hang_s=12"] if fault == "stop" else []  # a kill is noticed without it, and a start takes long
        job = {"overrides": [*WHAT, *how, *hang, f"name={name}"], "fault": fault, "at": at, "victim": victim}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))

    def drill(self, whole: str, *how: str, fault: str, at: int, victim: int) -> str | None:
        """One rank is killed or stopped at a call, then the run is started again. What was not as promised, in words."""
        name = f"{fault}-{victim}-{at}{'-'.join(['', *how])}".replace("=", "-")
        first = self.train(name, *how, fault=fault, at=at, victim=victim)
        self.slowest = max(self.slowest, first.seconds)
        if not first.happened:
            return "the call was not reached" if 0 in first.codes else f"exit codes {first.codes}"
        if first.seconds > MOST_S or any(code == 0 for code in first.codes):
            return f"the others went on for {first.seconds:.1f} s: exit codes {first.codes}"
        saved = max(p.name for p in (self._folder / "runs" / name / "checkpoints").glob("step-*"))
        if saved < f"step-{FAULTY - 2:010d}":
            return f"the newest checkpoint is {saved}"
        again = self.train(name, *how)
        if again.codes != [0] * RANKS:
            return f"started again: exit codes {again.codes}"
        found = difference(end_of(self._folder, name), end_of(self._folder, whole))
        if found is None:
            shutil.rmtree(self._folder / "runs" / name)
        return found


def rank(number: int, port: int, job: dict[str, Any], counted: int) -> None:
    """In a child: train; arm the shim in the save that is to go wrong."""
    from trainkit import launch
    from trainkit import run as runs
    from trainkit.checkpoint import Checkpointer

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "RANK": str(number)}
    os.environ.update(where, LOCAL_RANK=str(number))
    with open("said.txt", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    shim, save = ctypes.CDLL(os.environ["LD_PRELOAD"]), Checkpointer._save

    def faulty(self: Checkpointer, it: Any, *how: Any) -> None:
        mine = number == job["victim"] and it.step == FAULTY
        if mine:
            shim.shim_arm(job["at"], job["fault"].encode(), 0, b"")
        save(self, it, *how)
        if mine:
            os.write(counted, shim.shim_disarm().to_bytes(4, "little"))

    Checkpointer._save = faulty  # type: ignore[method-assign]
    code = 1
    try:
        code = launch.train(runs.composed(job["overrides"]), Path("runs"))
    except BaseException as error:
        print(f"rank {number}: {type(error).__name__}: {error}", flush=True)
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)


def serve(job: dict[str, Any]) -> Outcome:
    port, (read, counted) = free_port(), os.pipe()
    ranks = {}
    for number in range(RANKS):
        if (pid := os.fork()) == 0:
            rank(number, port, job, counted)
        ranks[pid] = number
    codes, fault_at, left = [0] * RANKS, None, set(ranks)
    while left:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status) or (ranks[pid] == job["victim"] and os.WIFSIGNALED(status) and fault_at is None):
            fault_at = time.monotonic()
        if not os.WIFSTOPPED(status):
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            left.discard(pid)
        victim = next(p for p, number in ranks.items() if number == job["victim"])
        if left == {victim} and fault_at is not None:
            seconds = time.monotonic() - fault_at
            os.kill(victim, signal.SIGKILL)
    seconds = seconds if job["fault"] == "stop" and fault_at else time.monotonic() - (fault_at or time.monotonic())
    os.close(counted)
    calls = int.from_bytes(os.read(read, 4), "little")
    os.close(read)
    return Outcome(codes, calls, fault_at is not None, seconds)


def main() -> None:
    import tests.warm  # noqa: F401  # so that children have it

    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line)).__dict__), flush=True)


if __name__ == "__main__":
    main()
