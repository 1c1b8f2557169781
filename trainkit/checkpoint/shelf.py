"""The folder that holds a run's checkpoints: what lies there, what may go, and what is set aside."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from trainkit.atomic import sync_folder
from trainkit.checkpoint import files, store
from trainkit.checkpoint.manifest import Manifest
from trainkit.checkpoint.retention import Kept, over_budget, tiers
from trainkit.errors import UserError
from trainkit.units import human_bytes

PROBE = "probe"
SPARE = 1.05  # of a checkpoint's size that has to be free before it is written


@dataclass(frozen=True)
class Keeping:
    """How many checkpoints to keep of which tier, and the bytes that all may take (None: any)."""

    keep: int
    best: int
    epochs: bool
    hours: float
    budget: float | None
    higher_is_better: bool


class Shelf:
    """Its caller holds the run's lock, and is the only one to call. `notes` are for a person."""

    def __init__(
        self, folder: Path, keeping: Keeping, notes: list[str], held: Callable[[], Collection[Path]] = tuple
    ) -> None:
        self.folder, self.keeping, self.notes = folder, keeping, notes
        self._held = held  # folders that are being read, by a mirror

    def tiers(self) -> dict[int, list[str]]:
        """The tiers of the whole checkpoints, by step."""
        return tiers_of([manifest for _, manifest in store.whole(self.folder)], self.keeping)

    def make_way(self, final: Path, size: int) -> None:
        """Free the name `final`, and room for `size` bytes: what is kept beyond the newest two may go for it.

        Raises:
            OSError: there is no room.
        """
        self.sweep(ignore_errors=True)  # what a save that failed could not remove, because the disk refused that too
        if final.exists():
            self.set_aside(final, "it stood where a new one belongs")
        needed = SPARE * size
        if (free := shutil.disk_usage(self.folder).free) < needed:
            self.prune(budget=max(0.0, self.taken() - (needed - free)), only={"rolling"})
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(None, f"{human_bytes(free)} are free and it takes {human_bytes(size)}")

    def taken(self) -> int:
        """Bytes of all whole checkpoints."""
        return sum(manifest.size for _, manifest in store.whole(self.folder))

    def doomed(self, budget: float | None = None, only: set[str] | None = None) -> list[tuple[Path, Manifest]]:
        """What `prune` would remove: what has no tier, and what goes beyond the budget."""
        good = {manifest.step: (path, manifest) for path, manifest in store.whole(self.folder)}
        belongs = tiers_of([m for _, m in good.values()], self.keeping)
        gone = [step for step, its in belongs.items() if not its]
        limit = self.keeping.budget if budget is None else budget
        if limit is not None:
            over = over_budget(_kept([m for _, m in good.values()]), belongs, limit)
            gone += [step for step in over if only is None or set(belongs[step]) <= only]
        held = {path.absolute() for path in self._held()}
        return [good[step] for step in sorted(gone) if good[step][0].absolute() not in held]

    def prune(self, budget: float | None = None, only: set[str] | None = None) -> None:
        """Remove what no tier keeps: first its name, durably, so that half of one is never found."""
        for path, _ in self.doomed(budget, only):
            trash = path.with_name(f"{store.TRASH}{path.name}")
            try:
                path.rename(trash)
                sync_folder(self.folder)
                shutil.rmtree(trash)
            except OSError as error:
                self.notes.append(f"warning: {path} could not be removed: {error.strerror}")

    def try_the_disk(self, expected_bytes: int) -> None:
        """Raise UserError when the disk takes no checkpoint, or has no room for those that are kept."""
        probe = self.folder / f"{store.PARTIAL}{PROBE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sweep()
            probe.mkdir()
            files.write(probe / PROBE, [b"\0" * min(expected_bytes, 1 << 20)])
            sync_folder(probe)
            shutil.rmtree(probe)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}): choose another disk with --runs"
            ) from error
        room = shutil.disk_usage(self.folder).free
        needed = (self.keeping.keep + self.keeping.best + 1) * expected_bytes - self.taken()
        if room < needed:
            raise UserError(
                f"{self.folder} has {human_bytes(room)} free and the run's checkpoints need {human_bytes(needed)}: "
                f"free some space, lower checkpoint.keep, or choose another disk with --runs"
            )

    def sweep(self, *, ignore_errors: bool = False) -> None:
        """Remove what earlier saves, or processes, left half written or half removed."""
        for left in [*self.folder.glob(f"{store.PARTIAL}*"), *self.folder.glob(f"{store.TRASH}*")]:
            shutil.rmtree(left, ignore_errors=ignore_errors)

    def set_aside_after(self, step: int) -> None:
        """Set all aside that are newer than `step`."""
        for newer in store.folders(self.folder):
            if (store.step_of(newer.name) or 0) > step:
                self.set_aside(newer, f"the run went back to step {step}")

    def set_aside(self, path: Path, why: str) -> None:
        """Take a checkpoint out of the way, without deleting it."""
        aside = path.with_name(f"{store.BAD}{path.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{store.BAD}{path.name}.{number}")
        path.rename(aside)
        sync_folder(self.folder)
        self.notes.append(f"warning: {path.name} was set aside as {aside.name}: {why}")


def tiers_of(manifests: list[Manifest], keeping: Keeping) -> dict[int, list[str]]:
    """The tiers of a run's checkpoints, by step."""
    return tiers(
        _kept(manifests),
        keep=keeping.keep,
        epochs=keeping.epochs,
        best=keeping.best,
        hours=keeping.hours,
        higher_is_better=keeping.higher_is_better,
    )


def _kept(manifests: list[Manifest]) -> list[Kept]:
    return [
        Kept(m.step, m.facts.get("metric"), bool(m.facts.get("epoch_end")), float(m.facts.get("seconds", 0.0)), m.size)
        for m in manifests
    ]
