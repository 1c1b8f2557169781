"""The checkpoints of one run: saved one at a time, in the background or not, and pruned only once a newer one is good."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trainkit.checkpoint import store, writing
from trainkit.checkpoint.manifest import BadCheckpoint
from trainkit.checkpoint.mirror import Mirror
from trainkit.checkpoint.shelf import Keeping, Shelf
from trainkit.checkpoint.staging import Staging, room_for
from trainkit.checkpoint.store import Loaded, Places
from trainkit.checkpoint.writing import Draft
from trainkit.errors import DamagedError
from trainkit.parallel import ElsewhereError, Group, LostRankError
from trainkit.units import human_bytes

TICK_S = 0.001  # by which a checkpoint is newer than the one before it, at least


class SaveFailed(RuntimeError):
    """A checkpoint could not be saved. Those that were there are untouched."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended. `stall_s` is how long training waited for it, `save_s` how long it took in all."""

    step: int
    stall_s: float
    save_s: float
    bytes: int
    error: SaveFailed | None


class Checkpointer:
    """At most one save is under way. Its caller holds the run's lock. Every rank makes the same calls."""

    def __init__(
        self,
        folder: Path,
        run: str,
        keeping: Keeping,
        versions: Mapping[str, str],
        *,
        asynchronous: bool,
        packed_names: tuple[str, ...],
        host: Group,
        saving: Group,
        mirror: Mirror | None,
        check_owner: Callable[[], None],
    ) -> None:
        self.notes: list[str] = []  # what a person should be told of what was found or could not be removed
        held = mirror.holds if mirror else set
        self.folder, self.shelf, self._mirror = folder, Shelf(folder, keeping, self.notes, held), mirror
        self._run, self._versions, self._packed = run, versions, packed_names
        self._asynchronous, self._host, self._saving = asynchronous, host, saving
        self._check_owner = check_owner
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._last: Draft | None = None  # whose plan holds for the next, usually
        self._time = 0.0  # of the newest checkpoint here, whatever the clock says
        self._lost: LostRankError | None = None
        self._outcomes: list[Outcome] = []

    def preflight(self, expected_bytes: int) -> None:
        """Find out before training starts whether the disk takes a checkpoint, and has room for those that are kept.

        Raises:
            UserError: it is read-only or too full.
        """
        self._host.first_does(lambda: self.shelf.try_the_disk(expected_bytes))
        if self._host.rank == 0:
            self._time = store.newest_time(self.folder.parent.parent)
        if self._asynchronous and not room_for(expected_bytes):
            self._asynchronous = False
            self.notes.append(
                f"warning: memory has no room for a copy of {human_bytes(expected_bytes)}, so training waits while a "
                f"checkpoint is written"
            )
        self._asynchronous = not self._host.max(int(not self._asynchronous))

    def make_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to get the memory that copies of these need, behind training: the first time that takes far longer than
        the copy."""
        if self._asynchronous and self._thread is None:  # a save that is under way has what it needs
            it = writing.draft(0, tensors, {}, {}, {}, group=self._host, packed_names=self._packed)
            self._thread = threading.Thread(target=self._staging.make_room, args=(it.held,), daemon=True)
            self._thread.start()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        carried: Mapping[str, bytes],
        *,
        facts: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Begin to save a checkpoint, after the one before it is done; `finished` says how it ended. With `wait`, or
        where saving is not asynchronous, it has ended when this returns.

        `facts` is what retention and lists know of it: `metric` (of an evaluation at this step, or None), `epoch_end`,
        `epoch`, `seconds`, `val_loss`.
        """
        begin = time.perf_counter()
        self.wait()
        it = writing.draft(
            step, tensors, state, carried, facts, group=self._host, packed_names=self._packed, like=self._last
        )
        self._last = it.plan()
        if wait or not self._asynchronous:
            self._save(it, self._host, begin, None)
            return
        it = self._staging.copy(it)
        stall = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._save, args=(it, self._saving, begin, stall), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finished(self) -> list[Outcome]:
        """How saves ended since this was asked last, on this rank.

        Raises:
            LostRankError: another rank is not there any more, so that there will be no other save.
        """
        if self._lost is not None:
            raise self._lost
        done, self._outcomes = self._outcomes, []
        return done

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the save that is under way, if one is; after `timeout_s` seconds it is given up."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def load_latest(self, places: Places = store.on_cpu) -> Loaded | None:
        """The newest good checkpoint, every byte of it verified, put into `places`; None where none was ever saved.

        One that is not good is set aside, never deleted, and said in `notes`.

        Raises:
            DamagedError: there are some and none is good.
        """
        bad = []
        names = self._host.first_does(lambda: [p.name for p in reversed(store.folders(self.folder))])
        for name in names:
            found, problem = self._read(self.folder / name, places)
            if found is not None:
                return found
            bad.append(f"{name}: {problem}")
            self._host.first_does(partial(self.shelf.set_aside, self.folder / name, problem))
        aside = sorted(p.name for p in self.folder.glob(f"{store.BAD}*")) if self.folder.exists() else []
        if bad or aside:
            raise DamagedError(
                f"no checkpoint in {self.folder} is good ({'; '.join(bad) or ', '.join(aside)}): "
                f"restore one from a copy, or train under another name"
            )
        return None

    def load(self, path: Path, places: Places = store.on_cpu) -> Loaded:
        """That very checkpoint of this run; newer ones are set aside, because the run goes on from here.

        Raises:
            DamagedError: it is not good.
        """
        found, problem = self._read(path, places)
        if found is None:
            raise DamagedError(f"{path} is not good: {problem}")
        self._host.first_does(lambda: self.shelf.set_aside_after(found.step))
        return found

    def _read(self, path: Path, places: Places) -> tuple[Loaded | None, str]:
        """A checkpoint, if every rank finds it good; else what was wrong where."""
        found: list[Loaded] = []

        def attempt() -> str | None:
            try:
                found.append(store.read(path, places, self._host))
            except BadCheckpoint as error:
                return str(error)
            return None

        problems = [problem for problem in self._host.all_do(attempt) if problem]
        return (None, problems[0]) if problems else (found[0], "")

    def _make_way(self, it: Draft) -> None:
        self._check_owner()
        self.shelf.make_way(self.folder / store.step_name(it.step), it.size)

    def _keep(self) -> None:
        """Prune, here and on the mirror, which gets the newest checkpoint, and the newest that is to be kept longer."""
        self.shelf.prune()
        if self._mirror is not None:
            belongs = self.shelf.tiers()
            newest = max(belongs)
            longer = {"best", "epoch", "hours"} & set(belongs[newest])
            self._mirror.submit(self.folder / store.step_name(newest), kept=bool(longer))
            self._mirror.keep(list(belongs))

    def _save(self, it: Draft, group: Group, begin: float, stall: float | None) -> None:
        """Write a draft, prune, and note how it ended. Never raises: what went wrong is in the outcome."""
        error: SaveFailed | None = None
        try:
            group.first_does(lambda: self._make_way(it))
            self._time = max(time.time(), self._time + TICK_S)
            writing.commit(
                self.folder,
                self._run,
                it,
                group=group,
                versions=self._versions,
                check_owner=self._check_owner,
                not_before=self._time,
            )
            group.first_does(self._keep)
        except LostRankError as lost:
            self._lost = lost
            return
        except (OSError, ValueError, RuntimeError) as raised:
            error = SaveFailed(f"step {it.step} could not be saved to {self.folder}: {_reason(raised)}")
        seconds = time.perf_counter() - begin
        self._outcomes.append(Outcome(it.step, seconds if stall is None else stall, seconds, it.size, error))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (
        str(error)
        if isinstance(error, BadCheckpoint | ElsewhereError | ValueError)
        else f"{type(error).__name__}: {error}"
    )
