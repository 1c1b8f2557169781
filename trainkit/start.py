"""Weights that a run begins with: those of another run's checkpoint (`start_from`).

They are read once, before the first step. From then on they, frozen or not, are in the run's own checkpoints, so that the
other run may go. Which checkpoint it was is part of what is learned.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import imports
from trainkit import run as runs
from trainkit.checkpoint import FOLDER, BadCheckpoint, find, store
from trainkit.checkpoint.manifest import Manifest
from trainkit.data import tokenizers
from trainkit.errors import DamagedError, UserError
from trainkit.hf import source
from trainkit.learner import MODEL, Learner
from trainkit.models.adapters import adapted
from trainkit.run import Run

BACKBONE = "backbone."  # the rest is a task's own, and the other run's task may be another
FREE = (
    "model.adapter",
    "model.dropout",
    "model.init_std",
    "model.context",
)  # what may differ from the other run's model


def identified(run: Run, folder: Path) -> Run:
    """`run` with what its `start_from` is. Where `folder` holds it already, under the same words, it is what it was then:
    `latest` would be another one by now.

    Raises:
        UserError: there is no such checkpoint, or not the one that it was.
    """
    run = with_kept_tokenizer(run, reversed(store.folders(folder / FOLDER)))
    if run.start_from is None:
        return run
    there = runs.read(folder)
    if there is not None and there.start_from == run.start_from and run.start in (None, there.start):
        return replace(run, start=there.start)
    if source.is_source(run.start_from):
        return replace(run, start=imports.identified(run))
    path, manifest = _found(run.start_from, folder.parent)
    if run.start not in (None, identity(manifest)):
        raise UserError(
            f"start_from={run.start_from} is {identity(manifest)}, and the run began with {run.start}: give that, or train "
            f"under another name"
        )
    _refuse_another_model(run, path)
    return replace(run, start=identity(manifest))


def with_kept_tokenizer(run: Run, checkpoints: Iterable[Path]) -> Run:
    """`run`, whose data is read with the tokenizer that its own checkpoints carry where the file that it came from is gone."""
    tokenizer = getattr(run.data, "tokenizer", None)
    if tokenizer is None or tokenizer.path is None or Path(tokenizer.path).exists():
        return run
    for checkpoint in checkpoints:
        if (kept := checkpoint / "tokenizer.json").is_file():
            return replace(run, data=replace(run.data, tokenizer=replace(tokenizer, path=str(kept))))
    return run


def load(run: Run, learner: Learner, tokenizer: Any, root: Path) -> Path:
    """Give `learner`, which has not begun, the weights that `run` starts from, every byte verified; where they lay. All
    ranks call it, each takes its own slices.

    Raises:
        UserError: there is no such checkpoint any more, or it is of another model or tokenizer.
        DamagedError: it is not good.
    """
    if source.is_source(run.start_from):
        return imports.load(run, learner, tokenizer)
    host = learner.ranks.host
    path = Path(host.first_does(lambda: str(_place(run, root))))
    layers = dict(adapted(learner.model))
    quantized = {f"{name}.weight" for name, layer in layers.items() if layer.form is not None}
    own = {name: t.detach() for name, t in learner.model.state_dict().items()}
    inside = {f"{name}.{part}" for name, layer in layers.items() for part in layer.state_dict()}
    wanted = (own.keys() - inside) | {f"{name}.weight" for name in layers} | {n for n in inside if n.endswith(".bias")}

    def places(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        given = {name.removeprefix(MODEL): facts for name, facts in described.items() if name.startswith(MODEL)}
        if odd := sorted(name for name in wanted ^ given.keys() if name.startswith(BACKBONE)):
            raise UserError(f"start_from={run.start_from} is of another model: one of them lacks {odd[0]}")
        whole = {name: torch.empty(given[name]["shape"], dtype=store.dtype_of(given[name])) for name in quantized}
        return {MODEL + name: whole[name] if name in quantized else own[name] for name in wanted & given.keys()}

    try:
        loaded = store.read(path, places, host)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}; give another start_from") from error
    theirs = tokenizers.load(loaded.files.get("tokenizer.json", b""))
    if theirs.identity != tokenizer.identity:
        raise UserError(
            f"start_from={run.start_from} reads the tokens of {theirs.name} and this data has {tokenizer.name}: give the "
            f"data that tokenizer, data.tokenizer={path / 'tokenizer.json'}"
        )
    for name, layer in layers.items():
        layer.adopt(loaded.tensors[f"{MODEL}{name}.weight"] if layer.form else None)
    return path


def identity(manifest: Manifest) -> str:
    """What a checkpoint is, wherever it lies: RUN/step-N@ and the beginning of its manifest's SHA-256."""
    return f"{manifest.run}/step-{manifest.step}@{hashlib.sha256(manifest.encode()).hexdigest()[:16]}"


def _place(run: Run, root: Path) -> Path:
    """Where the checkpoint lies that the run began with: where it was, or what the words mean now."""
    assert run.start_from is not None
    before = (run.start or "").partition("@")[0]
    for words in filter(None, (before, run.start_from)):
        with contextlib.suppress(UserError):
            path, manifest = _found(words, root)
            if run.start in (None, identity(manifest)):
                return path
    raise UserError(
        f"start_from={run.start_from} is not {run.start} any more, with which the run began: bring that back"
    )


def _found(words: str, root: Path) -> tuple[Path, Manifest]:
    path = find.resolve(words, root, runs.policy)
    try:
        return path, store.inspect(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}; give another start_from") from error


def _refuse_another_model(run: Run, path: Path) -> None:
    """Raise UserError when the checkpoint's model is another than the run's, which shapes alone would not always show."""
    base = runs.saved(runs.content(path))
    if base.model.adapter is not None:
        raise UserError(
            f"{path} holds an adapter: make one model of it first, trainkit checkpoint merge {path} --name NAME"
        )
    here, there = run.what(), base.what()
    keys = [key for key in there if key.startswith("model.") and not key.startswith(FREE)]
    if wrong := [f"{key}={there[key]}" for key in keys if here.get(key) != there[key]]:
        raise UserError(f"start_from={run.start_from} is another model; give this run {' '.join(wrong)}")
