"""One checkpoint on the disk: what it is called, what it must be, and reading it so that nothing else passes for it.

step-0000001000/
  shard-00000-of-00004.safetensors   tensors, or slices of them, as one rank wrote them
  train_state.json                   all else that a run goes on from
  run.yaml, tokenizer.json, ...      files carried along, so that the folder can be used alone
  manifest.json                      size and hash of every file, where every tensor lies, and its own hash
"""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainkit.checkpoint import files, layout, packed
from trainkit.checkpoint import manifest as manifests
from trainkit.checkpoint import tensors as tensor_files
from trainkit.checkpoint.layout import Box, local_boxes
from trainkit.checkpoint.manifest import BadCheckpoint, Manifest
from trainkit.parallel import Group

FOLDER = "checkpoints"  # in a run's folder
STATE = "train_state.json"
_STEP = re.compile(r"step-([0-9]{10})")
PARTIAL, TRASH, BAD = ".tmp-", ".trash-", ".bad-"
# what says that the bytes are not there any more; that they cannot be reached now, for want of rights or memory, is no
# reason to give a checkpoint up
_GONE = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EBADMSG, errno.EUCLEAN}
Places = Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint's content."""

    path: Path
    step: int
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]
    files: dict[str, bytes]


def step_name(step: int) -> str:
    """`step-0000001000`."""
    return f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def folders(root: Path) -> list[Path]:
    """The folders in `root` with a checkpoint's name, by step."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if step_of(p.name) is not None)


def whole(root: Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints in `root` that pass the cheap checks, by step. Loading, which looks closer, says what is wrong with
    the others."""
    found = []
    for path in folders(root):
        with contextlib.suppress(BadCheckpoint):
            found.append((path, inspect(path)))
    return found


def newest_time(root: Path) -> float:
    """When the newest checkpoint of all runs in `root` was saved, as it says itself (0 where there is none): a clock that was
    set back since must not make a newer one look older. One of more than a year ahead is not believed."""
    newest = 0.0
    for run in root.glob(f"*/{FOLDER}"):
        with contextlib.suppress(BadCheckpoint, OSError):
            for path in folders(run)[-1:]:
                newest = max(newest, inspect(path).time)
    return newest if newest < time.time() + 366 * 86400 else 0.0


def inspect(path: Path) -> Manifest:
    """A checkpoint's manifest, after the cheap checks: it is whole, belongs here, and every file is there in its size.

    Raises:
        BadCheckpoint: it is not.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise BadCheckpoint("not a folder")
        manifest = manifests.decode(files.read(path / manifests.NAME, manifests.MAX_BYTES))
        there = {entry.name: entry for entry in os.scandir(path)}
        if manifest.step != step_of(path.name):
            raise BadCheckpoint(f"it says that it is step {manifest.step}")
        if odd := sorted(set(there) ^ {*manifest.files, manifests.NAME}):
            raise BadCheckpoint(f"{odd[0]} is {'no part of it' if odd[0] in there else 'missing'}")
        for name, facts in manifest.files.items():
            found = there[name].stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != facts["size"]:
                raise BadCheckpoint(f"{name} has {found.st_size} bytes instead of {facts['size']}")
    except BadCheckpoint:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and error.errno not in _GONE:
            raise
        raise BadCheckpoint(str(error)) from error
    return manifest


def verify(path: Path) -> Manifest:
    """A checkpoint's manifest, after every byte of every file was hashed.

    Raises:
        BadCheckpoint: a byte is not the one that was saved.
    """
    manifest = inspect(path)
    for name, facts in manifest.files.items():
        with _blamed(name):
            _same(files.hash_of(path / name, facts["size"]), facts)
    return manifest


def load(path: Path) -> Loaded:
    """A checkpoint's content, with all tensors whole and on the CPU.

    Raises:
        BadCheckpoint: it is not what was saved.
    """
    return read(path, on_cpu)


def dtype_of(facts: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a tensor, from what a manifest says of it."""
    return tensor_files.DTYPES[facts["dtype"]]


def on_cpu(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Room for whole tensors in host memory."""
    return {
        name: torch.empty(facts["shape"], dtype=tensor_files.DTYPES[facts["dtype"]])
        for name, facts in described.items()
    }


def read(path: Path, places: Places, group: Group | None = None) -> Loaded:
    """A checkpoint's content. `places` gives the tensors that it goes into, for those that are wanted: whole ones or
    slices, on any device. Nothing else of its size is held: no byte is read twice, and none is executed.

    A rank reads the files that it needs; together the ranks of `group` hash all of them.

    Raises:
        BadCheckpoint: it is not what was saved. The places then hold parts of it.
    """
    manifest = inspect(path)
    group = group or Group()
    try:
        boxes = layout.boxes_by_file(manifest.tensors)
        for name, inside in boxes.items():
            _refuse_absurd(name, manifest, inside)
        into = places(manifest.tensors)
    except (ValueError, TypeError, KeyError) as error:
        if hasattr(error, "exit_code"):
            raise
        raise BadCheckpoint(f"its manifest is not one: {error}") from error
    held = {name: local_boxes(name, tensor) for name, tensor in into.items()}
    carried: dict[str, bytes] = {}
    for number, (name, facts) in enumerate(sorted(manifest.files.items())):
        with _blamed(name):
            if name not in boxes:
                carried[name] = files.read(path / name, facts["size"])
                _same(xxhash.xxh3_128_hexdigest(carried[name]), facts)
            elif number % group.size == group.rank or any(_wanted(box, held) for box in boxes[name].values()):
                with files.Reading(path / name, facts["size"]) as file:
                    _read_shard(file, name, facts["size"], boxes[name], held, manifest.tensors)
                    _same(file.rest(), facts)
    state = manifests.parse(carried.pop(STATE, b"null"))
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{STATE} holds no state")
    return Loaded(path, manifest.step, manifest, into, state, carried)


def _refuse_absurd(name: str, manifest: Manifest, inside: Mapping[str, Box]) -> None:
    """Raise ValueError before memory is asked for that a file of that size cannot fill."""
    claimed = sum(box.numel * dtype_of(manifest.tensors[box.name]).itemsize for box in inside.values())
    most = packed.MOST if name.endswith(packed.SUFFIX) else 1
    if claimed > most * int(manifest.files[name]["size"]):
        raise ValueError(f"{name} is too small for its tensors")


def _read_shard(
    file: files.Reading,
    name: str,
    size: int,
    boxes: Mapping[str, Box],
    held: Mapping[str, list[tuple[Box, Tensor]]],
    described: Mapping[str, Mapping[str, Any]],
) -> None:
    source: tensor_files.Source = packed.Unpacked(file, size) if name.endswith(packed.SUFFIX) else file
    left = set(boxes)
    for key, dtype, shape, fill in tensor_files.stream(source):
        box = boxes.get(key)
        if box is None or box.shape != shape or tensor_files.dtype_name(dtype) != described[box.name]["dtype"]:
            raise ValueError(f"the tensor {key} is not that of the manifest")
        left.discard(key)
        _put(box, dtype, fill, held.get(box.name, []))
    if left:
        raise ValueError(f"the tensor {min(left)} is missing")


def _put(box: Box, dtype: torch.dtype, fill: Callable[[Tensor], None], held: list[tuple[Box, Tensor]]) -> None:
    """Read a box into those that are held and overlap it; straight into its place where it lies there as in the file."""
    wanted = [(found, tensor) for other, tensor in held if (found := layout.overlap(box, other))]
    if not wanted:
        return
    (of_box, of_held), tensor = wanted[0]
    place = tensor[of_held]
    as_in_file = place.shape == box.shape and place.is_contiguous() and place.dtype == dtype
    if len(wanted) == 1 and as_in_file and place.device.type == "cpu":
        fill(place)
        return
    scratch = torch.empty(box.shape, dtype=dtype)
    fill(scratch)
    for (of_box, of_held), tensor in wanted:
        tensor[of_held].copy_(scratch[of_box])


def _wanted(box: Box, held: Mapping[str, list[tuple[Box, Tensor]]]) -> bool:
    return any(layout.overlap(box, other) is not None for other, _ in held.get(box.name, []))


def _same(digest: str, facts: Mapping[str, Any]) -> None:
    if digest != facts["xxh3_128"]:
        raise ValueError("it is not what was saved: its hash differs")


@contextlib.contextmanager
def _blamed(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if hasattr(error, "exit_code") or (isinstance(error, OSError) and error.errno not in _GONE):
            raise
        raise BadCheckpoint(f"{name}: {error}") from error
