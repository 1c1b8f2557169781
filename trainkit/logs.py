"""What ranks other than the first say, and what C++ says on the first: into a file for each in the run's folder, with their
last words. And what libraries say that nobody can do anything about: nowhere."""

import logging
import os
import sys
import time
import traceback
from pathlib import Path

_DIVERTED: list[Path] = []


def hush() -> None:
    """Keep torchao from saying of each of its GPU's libraries that this machine cannot load it, and torch of its types."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def path(folder: Path, rank: int) -> Path:
    """Where what `rank` of the run in `folder` says is written."""
    return folder / "logs" / f"rank-{rank}.log"


def divert(folder: Path, rank: int) -> None:
    """Let all that this process prints from here on, C++ and what crashes included, be added to its file. A disk that
    refuses leaves it where it goes."""
    if (descriptor := _opened(folder, rank)) is None:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    _DIVERTED.append(path(folder, rank))
    print(_head(rank), flush=True)


def set_aside(folder: Path, rank: int) -> None:
    """Let what C++ prints as an error from here on be added to its file, and what Python prints go where it goes."""
    if sys.stderr.fileno() != 2 or (descriptor := _opened(folder, rank)) is None:
        return
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    sys.stderr = sys.__stderr__ = terminal  # type: ignore[misc]  # what is printed when Python itself breaks
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.write(2, f"{_head(rank)}\n".encode())


def _opened(folder: Path, rank: int) -> int | None:
    file = path(folder, rank)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        print(f"warning: {file} cannot be written: {error.strerror}", file=sys.stderr)
        return None


def _head(rank: int) -> str:
    return f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}, process {os.getpid()}"


def trace(error: BaseException) -> None:
    """Where an error was raised, if this process has a file that nobody has to read."""
    if _DIVERTED:
        traceback.print_exception(error)


def last_words(folder: Path, rank: int, since: float) -> str | None:
    """The last line of a rank's file, if it said something after `since` (seconds since the epoch)."""
    try:
        file = path(folder, rank)
        if file.stat().st_mtime < since:
            return None
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 4096))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
