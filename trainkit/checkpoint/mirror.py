"""A copy of a run's checkpoints on a remote, made in the background: no failure of it stops or slows training."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainkit import atomic
from trainkit.checkpoint import store
from trainkit.checkpoint.manifest import BadCheckpoint
from trainkit.checkpoint.remote import CONFIG, Remote
from trainkit.checkpoint.storage import RemoteError
from trainkit.errors import UserError

STATE = "mirror.json"
Differs = Callable[[str, str], list[str]]  # two texts of run.yaml to what they say differently of what is learned


@dataclass(frozen=True)
class _Job:
    """A checkpoint to upload. `number` counts submissions; `since` is the monotonic time of the first try."""

    folder: Path
    step: int
    kept: bool
    number: int
    since: float | None = None


class Mirror:
    """Uploads the newest checkpoint that it was given, and the newest of those to be kept, one at a time, in a thread.

    `note` is called in that thread: a warning when uploads begin to fail, a line when they have caught up, a warning for
    a checkpoint that was given up. A try that fails is repeated after `backoff_s` (the first and the longest wait, in
    seconds; each is shortened by up to half at random) until `deadline_s` seconds have passed since the first, or until a
    newer one is there to be sent instead. `differs` tells runs of the same name apart: the mirror never writes to the
    folder of another run.

    Raises:
        UserError: the URL is none, or a package for it is missing.
    """

    def __init__(
        self,
        url: str,
        run_folder: Path,
        note: Callable[[str], None],
        *,
        differs: Differs,
        deadline_s: float = 3600.0,
        backoff_s: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        self._remote = Remote(url)
        self._folder, self._run = run_folder, run_folder.absolute().name
        self._note, self._differs = note, differs
        self._deadline_s, self._backoff_s = deadline_s, backoff_s
        before = last_state(run_folder)
        self._uploaded = before["uploaded_step"] if before and before["url"] == self._remote.url else None
        self._uploaded_number = self._submitted = 0
        self._problem: str | None = None
        self._problem_before = before["problem"] if before else None  # in the process before this one
        self._newest: _Job | None = None
        self._kept: _Job | None = None
        self._current: _Job | None = None
        self._keep: frozenset[int] | None = None
        self._prune_due = self._claimed = self._closing = self._ended = False
        self._failures = 0
        self._written = before
        self._writing = threading.Lock()
        self._changed = threading.Condition()  # holds all of the above; never held while anything is waited for
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def submit(self, folder: Path, *, kept: bool = False) -> None:
        """Upload this committed checkpoint. It replaces one that still waits, unless that one is `kept`; of several
        `kept` that wait only the newest is uploaded."""
        step = store.step_of(folder.name)
        if step is None:
            raise ValueError(f"{folder} is no checkpoint")
        with self._changed:
            if self._ended or self._closing:
                return
            self._submitted += 1
            self._newest = _Job(folder, step, kept, self._submitted)
            if kept:
                self._kept = self._newest
            self._changed.notify_all()

    def keep(self, steps: Collection[int]) -> None:
        """Remove from the remote what is not of these steps, and older than the newest whole one there."""
        with self._changed:
            if self._ended or self._closing:
                return
            self._keep, self._prune_due = frozenset(steps), True
            if self._kept is not None and self._kept is not self._newest and self._kept.step not in self._keep:
                self._kept = None
            self._changed.notify_all()

    def holds(self) -> set[Path]:
        """The folders that must stay where they are until they are uploaded: three at most."""
        with self._changed:
            return {job.folder for job in (self._current, self._newest, self._kept) if job is not None}

    @property
    def state(self) -> dict[str, Any]:
        """`url`; `uploaded_step`, the last that is whole there; `waiting_step`, the newest that is not yet; `problem`."""
        with self._changed:
            waiting = self._newest or self._current or self._kept
            return {
                "url": self._remote.url,
                "uploaded_step": self._uploaded,
                "waiting_step": waiting.step if waiting else None,
                "problem": self._problem,
            }

    def describe(self) -> str:
        """Where it sends to and how far it has come, for a person."""
        state = self.state
        there = "nothing is there yet" if state["uploaded_step"] is None else f"step {state['uploaded_step']} is there"
        problem = state["problem"] or self._problem_before
        return f"{state['url']}, {there}" + (f"; it failed: {problem}" if problem else "")

    def close(self, timeout_s: float) -> None:
        """Wait so many seconds for what is not uploaded yet, then give it up with a note. Never raises."""
        with self._changed:
            self._closing, self._failures = True, 0
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            state = self.state
            what = "the mirror is not done" if state["waiting_step"] is None else f"step {state['waiting_step']} is not"
            why = f" ({state['problem']})" if state["problem"] else ""
            self._end(state["problem"], f"warning: {what} on {self._remote.url} after {timeout_s:g} s: given up{why}")

    def _work(self) -> None:
        try:
            while self._turn():
                self._write()
        except UserError as error:
            self._end(str(error), f"warning: nothing is mirrored: {error}")
        except Exception as error:  # nothing that goes wrong here may cost a training step
            self._end(repr(error), f"warning: the mirror stopped: {error!r}")

    def _turn(self) -> bool:
        """Do one thing; False when there will be nothing more to do."""
        with self._changed:
            self._changed.wait_for(self._something)
            if self._ended or not (self._newest or self._kept or self._prune_due):
                return False
            job = self._current = self._take()
        self._write()
        try:
            if job is not None:
                self._claim(job.folder)
                self._remote.upload(job.folder)
                self._arrived(job)
            if self._prune_due:
                self._prune()
        except BadCheckpoint as error:
            self._drop(f"warning: {job and job.folder} is not mirrored: {error}")
        except (RemoteError, OSError) as error:
            self._failed(str(error))
        return True

    def _something(self) -> bool:
        return bool(self._newest or self._kept or self._prune_due or self._closing or self._ended)

    def _take(self) -> _Job | None:
        job = self._newest or self._kept
        if job is self._newest:
            self._newest = None
        if job is self._kept:
            self._kept = None
        return replace(job, since=time.monotonic()) if job is not None and job.since is None else job

    def _claim(self, folder: Path) -> None:
        """Raise UserError when the remote holds another run of this name."""
        if self._claimed:
            return
        store.inspect(folder)
        theirs = self._remote.config(self._run)
        if theirs is not None and (differences := self._differs((folder / CONFIG).read_text(), theirs)):
            raise UserError(f"{self._remote.url}/{self._run} is another run ({differences[0]}): choose another URL")
        self._claimed = True

    def _arrived(self, job: _Job) -> None:
        with self._changed:
            caught_up = self._problem is not None
            self._current, self._problem, self._failures = None, None, 0
            if job.number > self._uploaded_number:
                self._uploaded, self._uploaded_number = job.step, job.number
            self._prune_due = self._keep is not None
        if caught_up:
            self._say(f"the mirror caught up: step {job.step} is on {self._remote.url}")

    def _prune(self) -> None:
        with self._changed:
            keep, self._prune_due = self._keep or frozenset(), False
        newest = self._remote.newest(self._run)
        if newest is not None:
            for step in self._remote.steps(self._run):
                if step < newest and step not in keep:
                    self._remote.remove(self._run, step)

    def _drop(self, why: str) -> None:
        with self._changed:
            self._current = None
        self._say(why)

    def _failed(self, problem: str) -> None:
        """Put back what was tried, and wait."""
        now = time.monotonic()
        with self._changed:
            first, self._problem = self._problem is None, problem
            self._failures += 1
            job, self._current = self._current, None
            late = job is not None and job.since is not None and now - job.since > self._deadline_s
            if job is None:
                self._prune_due = not self._closing
            elif not late:
                if job.kept and self._kept is None:
                    self._kept = job
                self._newest = self._newest or job
            closing = self._closing
            waits = f"step {job.step} waits" if job is not None else "what is old there stays"
        if first:
            self._say(f"warning: the mirror fails, training goes on, {waits}: {problem}")
        if late and job is not None:
            self._say(f"warning: step {job.step} is not on {self._remote.url} after {self._deadline_s:g} s: given up")
        self._write()
        self._pause(closing)

    def _pause(self, closing: bool) -> None:
        """Wait before the next try; `close`, when it was not called yet at this failure, ends that."""
        first, longest = self._backoff_s
        delay = min(longest, first * 2.0 ** min(self._failures - 1, 30)) * random.uniform(0.5, 1.0)
        with self._changed:
            self._changed.wait_for(lambda: self._closing != closing or self._ended, delay)

    def _end(self, problem: str | None, why: str) -> None:
        """Do nothing any more. A thread that is still in a call of the remote's finds that out when it comes back."""
        with self._changed:
            if self._ended:
                return
            self._problem = problem
            state = self.state
            self._ended, self._prune_due = True, False
            self._newest = self._kept = self._current = None
            self._changed.notify_all()
        self._write(state)
        self._note(why)

    def _say(self, text: str) -> None:
        if not self._ended:
            self._note(text)

    def _write(self, state: dict[str, Any] | None = None) -> None:
        """Keep `mirror.json` as the state is; one that was given up keeps what it was given up with."""
        with self._writing:
            if state is None and self._ended:
                return
            state = state or self.state
            if state != self._written:
                with contextlib.suppress(OSError):  # it is for lists alone; a disk that refuses it refuses saves too
                    atomic.write(self._folder / STATE, json.dumps(state).encode() + b"\n")
                self._written = state


def last_state(run_folder: Path) -> dict[str, Any] | None:
    """What the mirror of a run last said of itself, for lists; None where there is no mirror."""
    try:
        state = json.loads((run_folder / STATE).read_bytes())
    except (OSError, ValueError):
        return None
    keys = {"url", "uploaded_step", "waiting_step", "problem"}
    return state if isinstance(state, dict) and state.keys() == keys else None
