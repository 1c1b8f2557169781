"""`history.json`: what a run passed over, kept beside its checkpoints, so that whatever it goes on from the same is passed
over again."""

import json
from pathlib import Path

from trainkit import atomic
from trainkit.guard import Rewind

NAME = "history.json"


def write(folder: Path, history: list[Rewind]) -> None:
    """Make the history durable."""
    atomic.write(folder / NAME, json.dumps([rewind.as_json() for rewind in history], indent=1).encode())


def read(folder: Path) -> list[Rewind]:
    """The history of a run's folder; empty where nothing happened."""
    file = folder / NAME
    found = json.loads(file.read_bytes()) if file.exists() else []
    return [Rewind(**{**rewind, "samples": tuple(rewind["samples"])}) for rewind in found]
