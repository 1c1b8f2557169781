"""A checkpoint, or somebody's model, as what is used: its tensors, its tokenizer and the run that it is of."""

import time
from pathlib import Path

import torch

from trainkit import imports
from trainkit import run as runs
from trainkit.checkpoint import BadCheckpoint, Loaded, find, load
from trainkit.checkpoint.manifest import Manifest
from trainkit.data import tokenizers
from trainkit.data.pretrained import tokenizer_at
from trainkit.errors import DamagedError, UserError
from trainkit.hf import resolve, source
from trainkit.launch import policy
from trainkit.learner import MODEL
from trainkit.run import Run


def opened(which: str, root: Path) -> tuple[Loaded, Run]:
    """What `which` names, a checkpoint or `hf:NAME`, and the run that it carries.

    Raises:
        UserError: there is none.
        DamagedError: it is not good.
    """
    if source.is_source(which):
        return _somebodys(which.removeprefix(source.PREFIX))
    path = find.resolve(which, root, policy)
    try:
        loaded = load(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}; `trainkit list-checkpoints` shows which are") from error
    run = runs.saved(loaded.files.get(runs.FILE, b""))
    held = sum(t.numel() * (2 if t.dtype == torch.uint8 else 1) for t in loaded.tensors.values())  # 4 bits are in bytes
    if run.model.parameters() > held:
        raise UserError(f"{path} is not of the model that its {runs.FILE} describes: it holds fewer parameters")
    return loaded, run


def tokenizer_of(loaded: Loaded) -> tokenizers.Tokenizer:
    """The tokenizer that a checkpoint carries."""
    return tokenizers.load(loaded.files.get("tokenizer.json", b""))


def _somebodys(name: str) -> tuple[Loaded, Run]:
    """A model that no run here has trained yet, as a checkpoint at step 0."""
    length = resolve.makes_vectors(name)
    words = ["data.length=1"] if length is None else ["task=embedding", "data=pairs", f"data.length={length}"]
    run = runs.composed(["model=hf", f"model.name={name}", *words])
    folder = source.located(name)
    model = run.task.build(run.model.build())
    imports.read_into(model, folder)
    tensors = {MODEL + key: tensor.detach() for key, tensor in model.state_dict().items()}
    manifest = Manifest(run=run.name, step=0, time=time.time(), versions={}, facts={}, files={}, tensors={})
    carried = {runs.FILE: run.yaml().encode(), "tokenizer.json": tokenizer_at(source.base_of(folder)).save()}
    return Loaded(path=folder, step=0, manifest=manifest, tensors=tensors, state={}, files=carried), run
