"""`metrics.jsonl`: one JSON object a logged step, for scripts. No step stands twice, however often a run was killed."""

import json
import math
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
    """A number that is NaN or infinite is written as null: JSON has no word for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        self._cut(step)

    def go_back(self, step: int) -> None:
        self._file.close()
        self._cut(step)

    def _cut(self, step: int) -> None:
        """Cut the file back to what the run goes on from: lines beyond `step`, or torn, are lost steps."""
        if self._path.exists():
            kept = [line for line in self._path.read_bytes().splitlines(keepends=True) if _is_kept(line, step)]
            atomic.write(self._path, b"".join(kept))
        self._file = self._path.open("a", buffering=1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items() if k != "eta_s"}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")

    def text(self, step: int, tag: str, text: str) -> None:
        """Texts are not numbers."""

    def note(self, message: str) -> None:
        """Nor are notes."""

    def close(self, status: str) -> None:
        self._file.close()


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
