"""One process a run. The kernel holds the lock, so that one whose holder was killed is free at once."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from trainkit.errors import UserError

TRIES = 100  # to lock a file that others remove at the same time
NAME = "LOCK"


class RunLock:
    """Held inside `with`. The file says who holds it; that it stays behind means nothing.

    Raises:
        UserError: another process holds it, with its pid and host; or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def __enter__(self) -> "RunLock":
        self._made = [p for p in (self._path.parent, *self._path.parent.parents) if not p.exists()]
        for attempt in range(TRIES):
            if self._locked(last=attempt == TRIES - 1):
                break  # else another process removed what was opened: see __exit__
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # on a full disk nobody is named; whether the run can be is found out later
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(me).encode(), 0)
        return self

    def _locked(self, *, last: bool) -> bool:
        """Lock the file; False when it is another one by now, but for the `last` time."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not last:
                return False  # the folder went between the two, or there can be none
            raise UserError(
                f"{self._path.parent} cannot be written: {error.strerror}; choose another --runs"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._holder()
            os.close(self._descriptor)
            raise UserError(
                f"the run {self._path.parent.name} is in use by {holder}: wait for it, stop it, or choose another name"
            ) from error
        if self._is_there():
            return True
        os.close(self._descriptor)
        if last:
            raise UserError(f"{self._path.parent} is removed again and again: choose another name or another --runs")
        return False

    def check(self) -> None:
        """Raise OSError where the folder of that name is not the one that was locked: it was moved away or removed, and
        what stands there now may be another process's."""
        if not self._is_there():
            raise OSError(errno.ESTALE, f"{self._path.parent} was moved or removed while this process used it")

    def _is_there(self) -> bool:
        try:
            there, mine = os.stat(self._path), os.fstat(self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made and error is not None and {p.name for p in self._path.parent.iterdir()} == {NAME}:
            self._path.unlink()  # a mistake that was found before anything was done leaves no folder behind
            with contextlib.suppress(OSError):  # another process may be in it by now
                for folder in self._made:
                    folder.rmdir()
        os.close(self._descriptor)

    def _holder(self) -> str:
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
