"""Where numbers go. A tracker is `start`, `log`, `text`, `note` and `close`; losing one never stops a run.

One file a tracker; the field order is the order in which they are told.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainkit.config import Count, config
from trainkit.tracking.console import Console
from trainkit.tracking.jsonl import Jsonl
from trainkit.tracking.mlflow import Mlflow
from trainkit.tracking.tensorboard import Tensorboard
from trainkit.tracking.wandb import Wandb


@config
class Tracking:
    """Log every `every` steps to any of the trackers."""

    every: Count = 10
    console: Console | None = None
    jsonl: Jsonl | None = None
    tensorboard: Tensorboard | None = None
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None

    def build(self, folder: Path) -> "Trackers":
        """The chosen trackers of a run's folder.

        Raises:
            UserError: one needs a package that is not installed.
        """
        chosen = [getattr(self, f.name) for f in fields(self) if f.name != "every"]
        return Trackers([tracker.build(folder) for tracker in chosen if tracker is not None])


class Trackers:
    """All trackers as one. One that fails is said once and left out from then on."""

    def __init__(self, trackers: list[Any]) -> None:
        self._trackers = trackers

    def start(self, header: Mapping[str, str], step: int, *, steps: int, config: str) -> None:
        """A run begins, or goes on, at `step` of `steps`. What was logged beyond `step` is to be forgotten."""
        self._tell(lambda t: t.start(header, step, steps, config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All numbers of a step, once."""
        self._tell(lambda t: t.log(step, metrics))

    def go_back(self, step: int) -> None:
        """The run goes on from `step`, an earlier one: what was logged beyond it is to be forgotten."""
        self._tell(lambda t: t.go_back(step))

    def text(self, step: int, tag: str, text: str) -> None:
        """Text that belongs to a step, such as a sample."""
        self._tell(lambda t: t.text(step, tag, text))

    def note(self, message: str) -> None:
        """A line for the person who watches."""
        self._tell(lambda t: t.note(message))

    def close(self, status: str) -> None:
        """The run ends: `done`, or why not."""
        self._tell(lambda t: t.close(status))

    def _tell(self, verb: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                verb(tracker)
            except Exception as error:  # whatever a tracker raises, the run is worth more
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                print(f"warning: {name} failed and is left out ({type(error).__name__}: {error})", file=sys.stderr)
