"""Checkpoints: when one is due, saving it, keeping the right ones, and finding the newest that is good."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from trainkit.checkpoint.checkpointer import Checkpointer, Outcome, SaveFailed
from trainkit.checkpoint.manifest import BadCheckpoint
from trainkit.checkpoint.mirror import Mirror
from trainkit.checkpoint.shelf import Keeping, tiers_of
from trainkit.checkpoint.store import FOLDER, Loaded, load
from trainkit.config import Count, Natural, NonNegative, Positive, config
from trainkit.parallel import Group

__all__ = [
    "FOLDER",
    "BadCheckpoint",
    "Checkpoint",
    "Checkpointer",
    "Keeping",
    "Loaded",
    "Outcome",
    "SaveFailed",
    "load",
    "tiers_of",
]


@config
class Checkpoint:
    """Save every `every` steps (0: at the end only) and whenever an evaluation is among the best.

    Kept are the newest `keep`, of which the newest two are always `latest` and its `backup`, the `keep_best` best, with
    `keep_epochs` the end of every epoch for ever, with `keep_hours` the first of every so many hours of training for
    ever. `max_gb` is the most that all of them may take; the newest two stay in any case.

    `asynchronous`: training goes on while a copy in host memory is written. `pack`: tensors of these are compressed
    (zstd). `attempts`: saves in a row that may fail before the run stops. `mirror`: an address (s3://, gs://, file://)
    to which what is kept is copied, behind training.
    """

    every: Natural = 100
    keep: Annotated[int, Ge(2)] = 2
    keep_best: Natural = 1
    keep_epochs: bool = False
    keep_hours: NonNegative = 0.0
    max_gb: Positive | None = None
    asynchronous: bool = True
    pack: tuple[Literal["model", "optimizer"], ...] = ()
    attempts: Count = 3
    mirror: str | None = None

    def due(self, step: int, *, epoch_end: bool) -> bool:
        """Whether to save after `step` updates."""
        return (self.every > 0 and step % self.every == 0) or (epoch_end and self.keep_epochs)

    def keeping(self, *, higher_is_better: bool) -> Keeping:
        """What retention has to know."""
        budget = None if self.max_gb is None else self.max_gb * 1e9
        return Keeping(self.keep, self.keep_best, self.keep_epochs, self.keep_hours, budget, higher_is_better)

    def build(
        self,
        folder: Path,
        *,
        higher_is_better: bool,
        versions: Mapping[str, str],
        host: Group | None = None,
        saving: Group | None = None,
        mirror: Mirror | None = None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> Checkpointer:
        """A checkpointer in a run's folder. `host` and `saving` are the ranks that save together, in the loop and behind
        it; `mirror` is the first rank's. `check_owner` raises OSError where the folder is not this process's any more."""
        return Checkpointer(
            folder / FOLDER,
            folder.name,
            self.keeping(higher_is_better=higher_is_better),
            versions,
            asynchronous=self.asynchronous,
            packed_names=tuple(f"{group}." for group in self.pack),
            host=host or Group(),
            saving=saving or Group(),
            mirror=mirror,
            check_owner=check_owner,
        )
