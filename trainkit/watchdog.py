"""A step that never ends: stacks of all threads are written down, and the process leaves, so that whoever started it can
start it again."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from trainkit.errors import FAILED, again

HEARTBEAT = "heartbeat.json"
BEAT_S = 10.0  # how often the heartbeat file is written
SUSPENDED_S = 5.0  # a look at the clock is due every second; one so late says that the whole process stood still


class Watchdog:
    """`beat` says that a step is done. `patience_s` holds until enough steps are known, and for whatever is no step.

    A thread of Python looks at the clock, so a hung thread must not hold the interpreter's lock; waiting for another
    rank, for a disk or for a GPU does not. A process that was suspended and goes on is not hung. `absent` says which other
    ranks do not answer.
    """

    def __init__(self, folder: Path, rank: int, patience_s: float | None, absent: Callable[[], str] = str) -> None:
        self._folder, self._rank, self._patience, self._absent = folder, rank, patience_s, absent
        self._stacks = folder / f"stacks-rank-{rank}.txt"
        self._seconds: deque[float] = deque(maxlen=200)
        self._step, self._phase = 0, "starting"
        self._last = time.monotonic()
        self._limit = patience_s or float("inf")
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_heartbeat(time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._begin(self._step, "ended" if error is None else "failed", time.monotonic())
        self._write_heartbeat(self._last)

    def beat(self, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        if self._phase == "step":
            self._seconds.append(now - self._last)
        self._begin(step, "step", now)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside is no step: an evaluation, a save. It may take as long as `patience_s`."""
        self._begin(self._step, name, time.monotonic())
        yield
        self._begin(self._step, "step after it", time.monotonic())

    def limit(self) -> float:
        """Seconds after which the present phase is taken for hung."""
        if self._patience is None:
            return float("inf")
        if self._phase != "step" or len(self._seconds) < 20:
            return self._patience
        slowest = sorted(self._seconds)[int(0.99 * len(self._seconds))]
        return min(self._patience, 2 * slowest + 30)

    def _begin(self, step: int, phase: str, now: float) -> None:
        self._step, self._phase, self._last = step, phase, now
        self._limit = self.limit()

    def _watch(self) -> None:
        written = looked = time.monotonic()
        while not self._done.wait(min(1.0, max(self._limit, 0.1))):
            now = time.monotonic()
            if now - looked > SUSPENDED_S:
                self._last += now - looked
            looked = now
            if now - written >= BEAT_S:
                self._write_heartbeat(now)
                written = now
            if now - self._last > self._limit:
                self._give_up(now)

    def _write_heartbeat(self, now: float) -> None:
        """For a script that looks from outside. It need not outlive the machine."""
        if self._rank != 0:
            return
        beat = {"time": time.time() - (now - self._last), "step": self._step, "phase": self._phase}
        partial = self._folder / f".{HEARTBEAT}.tmp"
        with contextlib.suppress(OSError):  # a full disk is the checkpoints' business
            partial.write_text(json.dumps({**beat, "pid": os.getpid(), "host": socket.gethostname()}))
            partial.replace(self._folder / HEARTBEAT)

    def _give_up(self, now: float) -> None:
        with self._stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        others = self._absent()
        print(
            f"trainkit: rank {self._rank} has been in the {self._phase} after step {self._step} for "
            f"{now - self._last:.0f} s and is taken for hung{', and ' if others else ''}{others}: "
            f"stacks of its threads are in {self._stacks}{again() if others else ''}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED)
