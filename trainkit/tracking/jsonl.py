"""`metrics.jsonl`: one JSON object a logged step, for scripts. No step stands twice, however often a run was killed."""

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from trainkit import atomic
from trainkit.config import config

NAME = "metrics.jsonl"


@config
class Jsonl:
    """Into the run's folder."""

    def build(self, folder: Path) -> "JsonlTracker":
        """A tracker that appends."""
        return JsonlTracker(folder / NAME)


class JsonlTracker:
    """A number that is NaN or infinite is written as null: JSON has no word for it. What a full disk refuses is held until
    it takes it, so that no step is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._waiting: list[tuple[int, bytes]] = []  # steps and lines that are not written yet
        self._refused = False
        self._writing = threading.Lock()  # a mirror notes things in a thread of its own

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        self._open()
        self.go_back(step)

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def go_back(self, step: int) -> None:
        """Cut the file back to what the run goes on from: lines beyond `step`, or torn, are lost steps."""
        self._waiting = [(at, line) for at, line in self._waiting if at <= step]
        content = self._path.read_bytes()
        kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, step))
        if content.startswith(kept):
            os.ftruncate(self._descriptor, len(kept))  # which takes no room
        else:  # something torn lies between
            atomic.write(self._path, kept)
            os.close(self._descriptor)
            self._open()
        self._write()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items() if k != "eta_s"}
        self._waiting.append((step, json.dumps({"step": step, **numbers}).encode() + b"\n"))
        self._write()

    def text(self, step: int, tag: str, text: str) -> None:
        """Texts are not numbers."""

    def note(self, message: str) -> None:
        """Nor are notes. But one may say that a step is saved, so that its line should be there too."""
        self._write()

    def close(self, status: str) -> None:
        self._write()
        os.close(self._descriptor)

    def _write(self) -> None:
        """Write what waits. A line that a full disk took a part of is taken back."""
        with self._writing:
            while self._waiting:
                line = self._waiting[0][1]
                end = os.lseek(self._descriptor, 0, os.SEEK_END)
                try:
                    if os.write(self._descriptor, line) < len(line):
                        os.ftruncate(self._descriptor, end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    if not self._refused:
                        print(f"warning: {self._path} waits for room ({error.strerror})", file=sys.stderr)
                    self._refused = True
                    return
                self._waiting.pop(0)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
