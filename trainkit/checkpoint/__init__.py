"""Checkpoints: when one is due, saving it, keeping the right ones, and finding the newest that is good."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from trainkit.atomic import sync_folder
from trainkit.checkpoint import store
from trainkit.checkpoint.manifest import BadCheckpoint, Manifest
from trainkit.checkpoint.retention import Kept, tiers
from trainkit.checkpoint.store import Loaded, load
from trainkit.config import Natural, config
from trainkit.errors import DamagedError, UserError
from trainkit.units import human_bytes

FOLDER = "checkpoints"
PROBE = "probe"

__all__ = ["BadCheckpoint", "Checkpoint", "Checkpointer", "Loaded", "SaveFailed", "load"]


class SaveFailed(RuntimeError):
    """A checkpoint could not be saved. Those that were there are untouched."""


@config
class Checkpoint:
    """Save every `every` steps (0: at the end only) and whenever an evaluation is among the best.

    Kept are the newest `keep`, of which the newest two are always `latest` and its `backup`, the `keep_best` best, and
    with `keep_epochs` the end of every epoch for ever.
    """

    every: Natural = 100
    keep: Annotated[int, Ge(2)] = 2
    keep_best: Natural = 1
    keep_epochs: bool = False

    def build(self, folder: Path, *, higher_is_better: bool, versions: Mapping[str, str]) -> "Checkpointer":
        """A checkpointer in a run's folder."""
        return Checkpointer(folder, self, higher_is_better, versions)


class Checkpointer:
    """The checkpoints of one run. Its caller holds the run's lock."""

    def __init__(self, folder: Path, policy: Checkpoint, higher_is_better: bool, versions: Mapping[str, str]) -> None:
        self.folder = folder / FOLDER
        self._run, self._policy, self._higher, self._versions = folder.name, policy, higher_is_better, versions
        self.notes: list[str] = []  # what a person should be told of what was found or could not be removed

    @property
    def keeps_best(self) -> bool:
        """Whether an improvement is worth a save."""
        return self._policy.keep_best > 0

    def due(self, step: int, *, epoch_end: bool) -> bool:
        """Whether to save after `step` updates."""
        every = self._policy.every
        return (every > 0 and step % every == 0) or (epoch_end and self._policy.keep_epochs)

    def preflight(self, expected_bytes: int) -> None:
        """Find out before training starts whether the disk takes a checkpoint, and has room for those that are kept.

        Raises:
            UserError: it is read-only or too full.
        """
        probe = self.folder / f"{store.PARTIAL}{PROBE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            probe.mkdir()
            store.files.write(probe / PROBE, [b"\0" * min(expected_bytes, 1 << 20)])
            sync_folder(probe)
            shutil.rmtree(probe)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}): choose another disk with --runs"
            ) from error
        room = shutil.disk_usage(self.folder).free
        there = sum(manifest.size for _, manifest in store.whole(self.folder))
        needed = (self._policy.keep + self._policy.keep_best + 1) * expected_bytes - there
        if room < needed:
            raise UserError(
                f"{self.folder} has {human_bytes(room)} free and the run's checkpoints need {human_bytes(needed)}: "
                f"free some space, lower checkpoint.keep, or choose another disk with --runs"
            )

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        carried: Mapping[str, bytes],
        *,
        facts: Mapping[str, Any],
    ) -> Path:
        """Save a checkpoint, durably and verified, and only then remove what no tier keeps.

        `facts` is what retention and lists know of it: `metric` (of an evaluation at this step, or None), `epoch_end`,
        `epoch`, `val_loss`. A folder that has that step's name already is set aside first.

        Raises:
            SaveFailed: the disk refused it, or it is not what was written; older ones are untouched.
        """
        try:
            final = self.folder / store.step_name(step)
            if final.exists():
                self._set_aside(final, "it stood where a new one belongs")
            path = store.commit(
                self.folder, self._run, step, tensors, state, carried, facts=facts, versions=self._versions
            )
        except BadCheckpoint as error:
            self._set_aside(final, str(error))
            raise SaveFailed(f"step {step} was not on the disk as it was written: {error}") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SaveFailed(f"step {step} could not be saved to {self.folder}: {reason}") from error
        self._prune()
        return path

    def load_latest(self) -> Loaded | None:
        """The newest good checkpoint, every byte of it verified; None where none was ever saved.

        One that is not good is set aside, never deleted, and said in `notes`.

        Raises:
            DamagedError: there are some and none is good.
        """
        bad = []
        for path in reversed(store.folders(self.folder)):
            try:
                return load(path)
            except BadCheckpoint as error:
                bad.append(f"{path.name}: {error}")
                self._set_aside(path, str(error))
        aside = sorted(p.name for p in self.folder.glob(f"{store.BAD}*")) if self.folder.exists() else []
        if bad or aside:
            raise DamagedError(
                f"no checkpoint in {self.folder} is good ({'; '.join(bad) or ', '.join(aside)}): "
                f"restore one from a copy, or train under another name"
            )
        return None

    def load(self, path: Path) -> Loaded:
        """That very checkpoint of this run; newer ones are set aside, because the run goes on from here.

        Raises:
            DamagedError: it is not good.
        """
        try:
            found = load(path)
        except BadCheckpoint as error:
            raise DamagedError(f"{path} is not good: {error}") from error
        for newer in store.folders(self.folder):
            if (store.step_of(newer.name) or 0) > found.step:
                self._set_aside(newer, f"the run went back to step {found.step}")
        return found

    def _prune(self) -> None:
        """Remove what no tier keeps: first its name, durably, so that half of one is never found."""
        good = {manifest.step: (path, manifest) for path, manifest in store.whole(self.folder)}
        belongs = tiers_of([m for _, m in good.values()], self._policy, self._higher)
        for step in [s for s, its in belongs.items() if not its]:
            path = good[step][0]
            trash = path.with_name(f"{store.TRASH}{path.name}")
            try:
                path.rename(trash)
                sync_folder(self.folder)
                shutil.rmtree(trash)
            except OSError as error:
                self.notes.append(f"warning: {path} could not be removed: {error.strerror}")

    def _sweep(self) -> None:
        """Remove what earlier processes left half written or half removed."""
        for left in [*self.folder.glob(f"{store.PARTIAL}*"), *self.folder.glob(f"{store.TRASH}*")]:
            shutil.rmtree(left)

    def _set_aside(self, path: Path, why: str) -> None:
        aside = path.with_name(f"{store.BAD}{path.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{store.BAD}{path.name}.{number}")
        path.rename(aside)
        sync_folder(self.folder)
        self.notes.append(f"warning: {path.name} was set aside as {aside.name}: {why}")


def tiers_of(manifests: list[Manifest], policy: Checkpoint, higher_is_better: bool) -> dict[int, list[str]]:
    """The tiers of a run's checkpoints, by step."""
    kept = [Kept(m.step, m.facts.get("metric"), bool(m.facts.get("epoch_end"))) for m in manifests]
    return tiers(
        kept,
        keep=policy.keep,
        epochs=policy.keep_epochs,
        best=policy.keep_best,
        higher_is_better=higher_is_better,
    )
