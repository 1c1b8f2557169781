"""A folder that is there whole or not at all, and tensors in it in files of a few gigabytes each."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from trainkit.atomic import sync_folder
from trainkit.errors import UserError
from trainkit.hf.weights import INDEX, SINGLE

MAX_BYTES = 5_000_000_000  # of one file, which is what hubs are used to


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all is well and is gone when not.

    Raises:
        UserError: something is there already, or the disk refuses it.
    """
    refuse_what_is_there(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in sorted(p for p in partial.rglob("*") if p.is_file()):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_what_is_there(folder: Path) -> None:
    """Raise UserError where `folder` is anything but a new name or an empty folder."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} is there already, and is not written over: give another folder")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_bytes: int = MAX_BYTES) -> None:
    """Write safetensors files of at most `max_bytes` (or one tensor), and an index where there are several."""
    from safetensors.torch import save_file

    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
