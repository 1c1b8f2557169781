"""One system with everything imported: reads jobs from stdin, does each in a forked child, says how the child ended.

    python -m benchmarks.reliability.server SYSTEM     (started by harness.py, under the shim)

A job is `save`: steps 1 and 2, then step 3 with a fault; or `resume`: what the system loads, by itself or from a path.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.reliability import SYSTEMS

SHIM = ctypes.CDLL(os.environ["LD_PRELOAD"])
LAST, SECONDS = 3, 120
ADOPT_ORPHANS = 36  # prctl's PR_SET_CHILD_SUBREAPER


class System(Protocol):
    def train(self, folder: Path, watch: "Watch") -> None:
        """Train and save, telling `watch` before and after the save of every step."""

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        """The state that a run goes on from: the system's own choice, or `path`; None where it would begin anew."""

    def checkpoints(self, folder: Path) -> list[Path]:
        """What a person would take for checkpoints, the newest first."""


def prints(state: Any, name: str = "") -> dict[str, str]:
    """A short print of everything in a state, by name."""
    if isinstance(state, Mapping):
        parts = [prints(value, f"{name}/{key}") for key, value in state.items()]
        return {key: value for part in parts for key, value in part.items()}
    if isinstance(state, torch.Tensor):
        raw = state.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: f"{state.dtype} {list(state.shape)} {hashlib.sha1(raw).hexdigest()[:12]}"}
    return {name: repr(state)}


def in_a_line(error: BaseException) -> str:
    """Without the traceback that DCP puts into its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


class Watch:
    """Arms the shim for the save of the last step, and knows what was to be saved and what was acknowledged."""

    def __init__(self, answer: Path, fault: str, at: int, sticky: int, log: str) -> None:
        self._answer, self._arming = answer, (at, fault.encode(), sticky, log.encode())
        self.told: dict[str, Any] = {"states": {}, "acknowledged": 0}

    def tell(self) -> None:
        self._answer.write_text(json.dumps(self.told))

    def saving(self, step: int, state: Mapping[str, Any]) -> None:
        """Step 0 is the state before any training, and never saved."""
        self.told["states"][step] = prints(state)
        if step == LAST:
            self.tell()  # the save may be the last thing this process does
            SHIM.shim_arm(*self._arming)

    def saved(self, step: int) -> None:
        if step == LAST:
            self.told["calls"] = SHIM.shim_disarm()
        self.told["acknowledged"] = step


def save(system: System, answer: Path, folder: str, fault: str, at: int, sticky: int, log: str) -> None:
    before = set(sys.modules)
    watch = Watch(answer, fault, at, sticky, log)
    try:
        system.train(Path(folder), watch)
    except BaseException as error:  # whatever a system raises when its disk is full; DCP's is no Exception
        SHIM.shim_disarm()
        watch.told["failed"] = in_a_line(error)
    watch.told["imported"] = sorted(set(sys.modules) - before)
    watch.tell()


def resume(system: System, answer: Path, folder: str, path: str | None) -> None:
    told: dict[str, Any] = {"checkpoints": [str(p) for p in system.checkpoints(Path(folder))]}
    try:
        state = system.resume(Path(folder), Path(path) if path else None)
        told["state"] = None if state is None else prints(state)
    except BaseException as error:  # whatever a system raises when a checkpoint is not good
        told["error"] = in_a_line(error)
    answer.write_text(json.dumps(told))


def wait(child: int) -> int:
    """How the child ended, once the processes that it left behind have ended too."""
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return status


def main() -> None:
    listed = SYSTEMS[sys.argv[1]]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a system prints is not a reply
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    torch.set_num_threads(1)
    system: System = getattr(importlib.import_module(f"benchmarks.reliability.{listed.module}"), listed.name)()
    for line in sys.stdin:
        job = json.loads(line)
        for name in job.get("import", []):  # what a first child imported late; some modules cannot be by their name
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            work = save if "save" in job else resume
            work(system, Path(job["answer"]), **(job.get("save") or job["resume"]))
            os._exit(0)
        replies.write(json.dumps({"killed": os.WIFSIGNALED(wait(child))}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
