"""Finding checkpoints by what people call them: latest, best, a run's name, RUN/step-N, a path."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainkit.checkpoint import FOLDER, Keeping, store, tiers_of
from trainkit.checkpoint.manifest import BadCheckpoint
from trainkit.checkpoint.mirror import last_state
from trainkit.errors import DamagedError, UserError, nearest

Policy = Callable[[Path], Keeping]  # a run's folder to what its config says of its tiers


@dataclass(frozen=True)
class Entry:
    """A checkpoint for a list. `verified`: every byte is what was saved."""

    run: str
    step: int
    tiers: list[str]
    path: Path
    bytes: int
    verified: bool
    val_loss: float | None
    metric: float | None
    epoch: float | None
    time: float | None
    problem: str | None
    mirror: dict[str, Any] | None = None  # of its run: url, uploaded_step, waiting_step, problem

    def as_json(self) -> dict[str, Any]:
        """The entry as a script reads it."""
        return {**self.__dict__, "path": str(self.path)}


def list_checkpoints(root: Path, policy: Policy, run: str | None = None) -> list[Entry]:
    """Every checkpoint of every run in `root`, by run and step, each one verified.

    Raises:
        UserError: there is no run of that name.
    """
    if run is not None and not (root / run).is_dir():
        raise UserError(f"there is no run '{run}' in {root}{nearest(run, runs_in(root))}")
    return [entry for name in ([run] if run else runs_in(root)) for entry in _entries(root / name, policy)]


def resolve(where: str, root: Path, policy: Policy) -> Path:
    """The folder of the checkpoint that `where` names: `latest` or `best` (of the newest run), a run's name (its
    latest), `RUN/best`, `RUN/step-N`, or a path to a run or to a checkpoint.

    Raises:
        UserError: there is none, with what was looked at.
    """
    path = Path(where)
    if store.step_of(path.name) is not None and path.is_dir():
        return path
    if (path / FOLDER).is_dir() and len(path.parts) > 1:
        return _of_run(path, "latest", policy)
    if where in ("latest", "best"):
        return _of_run(_newest_run(root), where, policy)
    name, _, which = where.partition("/")
    if not (root / name).is_dir():
        raise UserError(
            f"there is no checkpoint '{where}': looked for a run in {root} and for a path"
            f"{nearest(name, ['latest', 'best', *runs_in(root)])}"
        )
    return _of_run(root / name, which or "latest", policy)


def _of_run(folder: Path, which: str, policy: Policy) -> Path:
    good = store.whole(folder / FOLDER)
    if not good:
        refuse_damaged([folder])
        raise UserError(f"the run {folder.name} has no checkpoint: looked in {folder / FOLDER}")
    if which == "latest":
        return good[-1][0]
    if which == "best":
        belongs = tiers_of([m for _, m in good], policy(folder))
        best = [path for path, m in good if "best" in belongs[m.step]]
        if not best:
            raise UserError(f"the run {folder.name} has no best checkpoint: none was saved where it was evaluated")
        return best[0]
    match = re.fullmatch(r"(?:step-)?(\d+)", which)
    found = [path for path, m in good if match and m.step == int(match[1])]
    if not found:
        steps = ", ".join(f"step-{m.step}" for _, m in good)
        raise UserError(f"the run {folder.name} has no checkpoint '{which}': it has {steps}, latest and best")
    return found[0]


def refuse_damaged(folders: list[Path]) -> None:
    """Raise DamagedError when runs that have no good checkpoint have some that are not good."""
    bad = [p for folder in folders for p in (folder / FOLDER).iterdir() if p.name.startswith((store.BAD, "step-"))]
    if bad:
        raise DamagedError(
            f"no checkpoint in {', '.join(str(f / FOLDER) for f in folders)} is good: looked at "
            f"{', '.join(sorted(p.name for p in bad))}; restore one from a copy, or train under another name"
        )


def _newest_run(root: Path) -> Path:
    newest: tuple[float, Path] | None = None
    for name in runs_in(root):
        good = store.whole(root / name / FOLDER)
        if good and (newest is None or good[-1][1].time > newest[0]):
            newest = good[-1][1].time, root / name
    if newest is None:
        refuse_damaged([root / name for name in runs_in(root)])
        looked = ", ".join(runs_in(root)) or "no runs"
        raise UserError(f"there is no checkpoint in {root} (it holds {looked}): start a run with `trainkit train`")
    return newest[1]


def runs_in(root: Path) -> list[str]:
    """The names of the runs in `root`."""
    return sorted(p.name for p in root.iterdir() if (p / FOLDER).is_dir()) if root.is_dir() else []


def _entries(folder: Path, policy: Policy) -> list[Entry]:
    belongs = tiers_of([m for _, m in store.whole(folder / FOLDER)], policy(folder))
    mirror = last_state(folder)
    entries = [_entry(path, folder.name, belongs) for path in store.folders(folder / FOLDER)]
    return [replace(entry, mirror=mirror) for entry in entries]


def _entry(path: Path, run: str, belongs: dict[int, list[str]]) -> Entry:
    step = store.step_of(path.name)
    assert step is not None
    try:
        manifest, problem = store.verify(path), None
    except BadCheckpoint as error:
        size = sum(p.lstat().st_size for p in path.iterdir()) if path.is_dir() else 0
        return Entry(run, step, [], path, size, False, None, None, None, None, str(error))
    facts = manifest.facts
    return Entry(
        run,
        step,
        belongs.get(step, []),
        path,
        manifest.size,
        True,
        facts.get("val_loss"),
        facts.get("metric"),
        facts.get("epoch"),
        manifest.time,
        problem,
    )
