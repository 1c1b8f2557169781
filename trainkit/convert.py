"""Weights from others' checkpoints: torch.save files and torch.distributed.checkpoint folders.

Both are pickles. They are read in a process of its own, with limits, which unpickles nothing but tensors and what says
where they lie, and hands back safetensors.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trainkit.checkpoint import files, tensors
from trainkit.errors import UserError

PREFIXES = (
    "_orig_mod.",
    "module.",
    "state_dict.",
    "model_state_dict.",
    "model.",
    "backbone.",
)  # what wrappers put before
OUT = "out.safetensors"


def tensors_of(source: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by dotted name, on the CPU.

    Raises:
        UserError: there is none, or it holds something else than tensors and numbers.
    """
    if not source.exists():
        raise UserError(f"there is no {source}: give a torch.save file or a DCP folder")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "trainkit.unpickle", str(source), place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise UserError(f"{source} cannot be imported: {why}")
        found, file = {}, Path(place, OUT)
        with files.Reading(file, file.stat().st_size) as reading:
            for name, dtype, shape, fill in tensors.stream(reading):
                found[name] = torch.empty(shape, dtype=dtype)
                fill(found[name])
    return found


def put(given: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy the tensors into `model`, in place, by name: whatever wrappers put before the names, on either side, does not
    count.

    Raises:
        UserError: one is missing or has another shape.
    """
    bare = {_bare(name): tensor for name, tensor in given.items()}
    with torch.no_grad():
        for name, own in model.state_dict().items():
            found = bare.get(_bare(name))
            if found is None:
                some = ", ".join(sorted(bare)[:3])
                raise UserError(f"the checkpoint has no tensor {_bare(name)} (it has {some}, ...): is it this model's?")
            if found.shape != own.shape:
                raise UserError(f"{_bare(name)} is {tuple(found.shape)} there and {tuple(own.shape)} in this model")
            own.copy_(found)


def _bare(name: str) -> str:
    while (short := next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)) != name:
        name = short
    return name
