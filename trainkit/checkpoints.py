"""Looking after checkpoints: the verbs of `trainkit checkpoint`."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from trainkit import run as runs
from trainkit import versions
from trainkit.checkpoint import FOLDER, BadCheckpoint, Loaded, fetch, find, load, store, writing
from trainkit.checkpoint.lock import RunLock
from trainkit.checkpoint.manifest import Manifest
from trainkit.checkpoint.remote import Remote
from trainkit.checkpoint.shelf import Shelf
from trainkit.errors import DAMAGED, DONE, DamagedError, UserError
from trainkit.launch import adopt, policy
from trainkit.learner import MODEL, OPTIMIZER
from trainkit.parallel import Group
from trainkit.units import human_bytes, human_count, human_time


def verify(which: str, root: Path, *, everything: bool) -> int:
    """Hash every byte of a checkpoint, or of all of a run's (of all runs' for `latest`); a line each. The exit code is 74
    when one is not good."""
    paths = [find.resolve(which, root, policy)]
    if everything:
        folders = [root / name for name in find.runs_in(root)] if which == "latest" else [paths[0].parents[1]]
        paths = [path for folder in folders for path in store.folders(folder / FOLDER)]
    code = DONE
    for path in paths:
        begin = time.perf_counter()
        try:
            manifest = store.verify(path)
        except BadCheckpoint as error:
            code = DAMAGED
            print(f"bad   {path}: {error}")
            continue
        rate = manifest.size / max(time.perf_counter() - begin, 1e-9)
        print(f"good  {path}: {len(manifest.files)} files, {human_bytes(manifest.size)} at {human_bytes(int(rate))}/s")
    return code


def show(which: str, root: Path, *, as_json: bool) -> None:
    """What a checkpoint says of itself."""
    path = find.resolve(which, root, policy)
    manifest = _inspected(path)
    groups = {
        name: sum(_bytes(facts) for tensor, facts in manifest.tensors.items() if tensor.startswith(prefix))
        for name, prefix in (("model", MODEL), ("optimizer", OPTIMIZER))
    }
    said: dict[str, Any] = {
        "path": str(path),
        "run": manifest.run,
        "step": manifest.step,
        "time": manifest.time,
        **manifest.facts,
        "versions": dict(manifest.versions),
        "tensors": len(manifest.tensors),
        "bytes": {**groups, "files": manifest.size},
        "files": {name: facts["size"] for name, facts in manifest.files.items()},
    }
    if as_json:
        print(json.dumps(said, indent=2))
        return
    age = human_time(max(0.0, time.time() - manifest.time))
    print(f"{path}\n  run {manifest.run}, step {manifest.step}, saved {age} ago")
    for name, value in manifest.facts.items():
        print(f"  {name.replace('_', ' '):12} {'-' if value is None else value}")
    print(f"  {'made with':12} {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}")
    sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in groups.items())
    print(f"  {'tensors':12} {len(manifest.tensors)} ({sizes})")
    for name, facts in sorted(manifest.files.items()):
        print(f"  {human_bytes(facts['size']):>12} {name}")


def diff(first: str, second: str, root: Path, *, as_json: bool, most: int = 10) -> None:
    """What changed between two checkpoints: config, tensors, and how far the weights moved."""
    a, b = (_loaded(which, root) for which in (first, second))
    one, two = (runs.saved(it.files[runs.FILE].decode()) for it in (a, b))
    moved = _moved(a.tensors, b.tensors)
    said: dict[str, Any] = {
        "config": one.differs(two),
        "only_in_first": sorted(a.tensors.keys() - b.tensors.keys()),
        "only_in_second": sorted(b.tensors.keys() - a.tensors.keys()),
        "other_shape": sorted(
            n for n in a.tensors.keys() & b.tensors.keys() if a.tensors[n].shape != b.tensors[n].shape
        ),
        "equal": sum(1 for _, change in moved.values() if change == 0),
        "moved": {name: {"norm": norm, "relative_change": change} for name, (norm, change) in moved.items() if change},
    }
    if as_json:
        print(json.dumps(said, indent=2))
        return
    print(f"{a.path} (step {a.step}) and {b.path} (step {b.step})")
    for line in said["config"]:
        print(f"  config: {line}")
    for key in ("only_in_first", "only_in_second", "other_shape"):
        for name in said[key]:
            print(f"  {key.replace('_', ' ')}: {name}")
    print(f"  {said['equal']} tensors are equal to the bit, {len(said['moved'])} are not")
    table = Table("norm", "relative change", Column("tensor", overflow="fold"), box=None, pad_edge=False)
    for name, (norm, change) in sorted(moved.items(), key=lambda item: -item[1][1])[:most]:
        if change:
            table.add_row(f"{norm:.4g}", f"{change:.3g}", name)
    Console().print(table)


def average(whiches: list[str], out: str, root: Path) -> None:
    """The mean of several checkpoints' weights (Izmailov et al. 2018, arXiv:1803.05407), as a run of its own that can be
    evaluated, written with and exported. It carries no optimizer state.

    Raises:
        UserError: they are not of one model, or the name is taken.
    """
    if len(whiches) < 2:
        raise UserError("an average takes two checkpoints or more, such as RUN/step-100 RUN/step-200")
    folder = root / out
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out")
    parts = [_loaded(which, root) for which in whiches]
    last = max(parts, key=lambda it: it.step)
    kept = {name: tensor for name, tensor in last.tensors.items() if not name.startswith(OPTIMIZER)}
    for it in parts:
        here = {name: tuple(t.shape) for name, t in it.tensors.items() if name.startswith(MODEL)}
        there = {name: tuple(t.shape) for name, t in kept.items() if name.startswith(MODEL)}
        if here != there:
            raise UserError(f"{it.path} is another model's than {last.path}: only weights of one model can be averaged")
    for name in kept:
        if name.startswith(MODEL):
            mean = torch.stack([it.tensors[name].double() for it in parts]).mean(0)
            kept[name] = mean.to(kept[name].dtype)
    run = runs.saved(last.files[runs.FILE].decode(), [f"name={out}"])
    carried = {**last.files, runs.FILE: run.yaml().encode()}
    facts = {**last.manifest.facts, "metric": None, "val_loss": None, "epoch_end": False}
    (folder / FOLDER).mkdir(parents=True)
    runs.claim(folder, run)
    group = Group()
    draft = writing.draft(last.step, kept, last.state, carried, facts, group=group)
    path = writing.commit(folder / FOLDER, out, draft, group=group, versions=versions.installed())
    print(f"{path} is the mean of {', '.join(str(it.path) for it in parts)}. What to try next:")
    print(f"  trainkit evaluate {out}")


def prune(name: str, overrides: list[str], root: Path, *, yes: bool) -> None:
    """Show what the run's policy, or another one, would remove, and remove it once that is agreed to."""
    folder = root / name
    if not (folder / FOLDER).is_dir():
        raise UserError(f"there is no run '{name}' in {root}")
    run = runs.saved((folder / runs.FILE).read_text(), overrides)
    keeping = run.checkpoint.keeping(higher_is_better=run.evaluation.higher_is_better)
    with RunLock(folder):
        notes: list[str] = []
        shelf = Shelf(folder / FOLDER, keeping, notes)
        doomed = shelf.doomed()
        if not doomed:
            print(f"nothing to remove: every checkpoint of {name} belongs to a tier")
            return
        for path, manifest in doomed:
            print(f"{path}  {human_bytes(manifest.size)}")
        total = human_bytes(sum(manifest.size for _, manifest in doomed))
        if not yes and not _agreed(f"remove these {len(doomed)} checkpoints ({total})?"):
            print("nothing was removed")
            return
        shelf.prune()
        for note in notes:
            print(note)
        print(f"removed {len(doomed) - len(notes)}, {total}")


def copy(source: str, target: str, root: Path) -> None:
    """A checkpoint, with its run's config, from or to an address or a folder of runs, verified on both sides.

    Raises:
        UserError: there is none, or the target holds another run of that name.
    """
    if fetch.is_url(source) and fetch.is_url(target):
        raise UserError("one of the two has to be on this machine: copy it here first")
    if not fetch.is_url(target):
        where = source if fetch.is_url(source) else f"file://{find.resolve(source, root, policy).absolute()}"
        print(f"copied to {fetch.fetch(where, Path(target), differs=runs.differ, adopt=adopt, note=print)}, verified")
        return
    path = find.resolve(source, root, policy)
    name, remote = path.parents[1].name, Remote(target)
    there = remote.config(name)
    if there is not None and (changed := runs.differ(runs.content(path.parents[1]).decode(), there)):
        raise UserError(f"{target} holds another run '{name}' ({changed[0]}): choose another place")
    try:
        manifest = remote.upload(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}") from error
    print(f"copied {path}, {human_bytes(manifest.size)}, verified. It goes on anywhere with:")
    print(f"  trainkit resume {target.rstrip('/')}/{name}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to ask: give --yes to remove them")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _moved(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of every tensor that both have: its norm in `a`, and the norm of the change relative to it."""
    moved = {}
    for name in a.keys() & b.keys():
        if a[name].shape == b[name].shape and a[name].numel():
            norm = float(a[name].double().norm())
            change = float((b[name].double() - a[name].double()).norm())
            moved[name] = norm, change / norm if norm else change
    return moved


def _bytes(facts: Mapping[str, Any]) -> int:
    return int(torch.Size(facts["shape"]).numel()) * store.dtype_of(facts).itemsize


def _inspected(path: Path) -> Manifest:
    try:
        return store.inspect(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}") from error


def _loaded(which: str, root: Path) -> Loaded:
    path = find.resolve(which, root, policy)
    try:
        return load(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}") from error


def imported(source: Path, name: str, overrides: list[str], root: Path) -> None:
    """The weights of a torch.save file or a DCP folder as the first checkpoint of a new run.

    Raises:
        UserError: they are not those of the model that the overrides describe, or the name is taken.
    """
    from trainkit import build, convert

    run = runs.composed([*overrides, f"name={name}"])
    folder = root / name
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --name")
    build.check(run)
    tensors = convert.tensors_of(source)
    it = build.learner(run, corpus := run.data.open(), build.ranks(run))
    convert.put(tensors, it.model)
    it.loader.close()
    facts = {"metric": None, "val_loss": None, "epoch": 0.0, "epoch_end": False, "tokens": 0, "seconds": 0.0}
    state = build.first_state(run, it, corpus)
    carried = {runs.FILE: run.yaml().encode(), "tokenizer.json": corpus.tokenizer.save()}
    (folder / FOLDER).mkdir(parents=True)
    runs.claim(folder, run)
    draft = writing.draft(0, it.tensors(), state, carried, facts, group=Group())
    path = writing.commit(folder / FOLDER, name, draft, group=Group(), versions=versions.installed())
    print(f"{path} holds {human_count(run.model.parameters())} parameters of {source}. What to try next:")
    print(f"  trainkit evaluate {name}\n  trainkit resume {name}")
