"""A model and its adapter as one model: `trainkit checkpoint merge`."""

from dataclasses import replace
from pathlib import Path

import torch

from trainkit import run as runs
from trainkit import versions
from trainkit.checkpoint import FOLDER, BadCheckpoint, find, load, writing
from trainkit.errors import DamagedError, UserError
from trainkit.learner import MODEL, OPTIMIZER, load_model
from trainkit.models import adapters
from trainkit.parallel import Group


def merge(which: str, name: str, root: Path) -> None:
    """The weights of an adapter's checkpoint with the adapter added to them, as a run of its own whose model has none. A
    quantized base is made whole. It carries no optimizer state.

    Raises:
        UserError: the checkpoint has no adapter, or the name is taken.
    """
    folder = root / name
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --name")
    path = find.resolve(which, root, runs.policy)
    try:
        loaded = load(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}") from error
    own = runs.saved(loaded.files[runs.FILE])
    if own.model.adapter is None:
        raise UserError(f"{path} has no adapter to merge: it is one model already")
    wide = torch.promote_types(getattr(torch, own.precision.params), torch.float32)
    model = own.task.build(own.model.build()).to(wide)
    load_model(model, loaded.tensors)
    plain = {MODEL + key: tensor for key, tensor in adapters.merged(model).items()}
    rest = {key: t for key, t in loaded.tensors.items() if not key.startswith((MODEL, OPTIMIZER))}
    run = replace(own, name=name, model=replace(own.model, adapter=None), start_from=None, start=None)
    facts = {**loaded.manifest.facts, "metric": None, "val_loss": None, "epoch_end": False}
    (folder / FOLDER).mkdir(parents=True)
    runs.claim(folder, run)
    carried = {**loaded.files, runs.FILE: run.yaml().encode()}
    draft = writing.draft(loaded.step, plain | rest, loaded.state, carried, facts, group=Group())
    made = writing.commit(folder / FOLDER, name, draft, group=Group(), versions=versions.installed())
    print(f"{made} is {path} without its adapter. What to try next:")
    print(f"  trainkit evaluate {name}\n  trainkit train start_from={name} name=ANOTHER")
