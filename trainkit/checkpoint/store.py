"""One checkpoint: written so that it is there whole or not at all, read so that nothing else passes for it.

step-0000001000/
  shard-00000-of-00001.safetensors   all tensors
  train_state.json                   all else that a run goes on from
  run.yaml, tokenizer.json, ...      files carried along, so that the folder can be used alone
  manifest.json                      size and hash of every file, and its own
"""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from trainkit.atomic import sync_folder
from trainkit.checkpoint import files
from trainkit.checkpoint import manifest as manifests
from trainkit.checkpoint import tensors as tensor_files
from trainkit.checkpoint.manifest import BadCheckpoint, Manifest

STATE = "train_state.json"
_STEP = re.compile(r"step-(\d{10})")
PARTIAL, TRASH, BAD = ".tmp-", ".trash-", ".bad-"


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint's content; tensors are on the CPU."""

    path: Path
    step: int
    manifest: Manifest
    tensors: dict[str, Tensor]
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


def commit(
    folder: Path,
    run: str,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    carried: Mapping[str, bytes],
    *,
    facts: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Path:
    """Save a checkpoint. When this returns it is on the disk, under its final name, and was read back and verified.

    Every file is written into a hidden folder and fsynced, then the folder; one rename that replaces nothing makes it
    visible, and an fsync of the parent keeps it so.

    Raises:
        OSError: the disk refused something; nothing of this checkpoint is left to be found.
        BadCheckpoint: what was read back is not what was written.
    """
    final = folder / step_name(step)
    partial = folder / f"{PARTIAL}{final.name}-{os.getpid()}"
    partial.mkdir()
    try:
        written, placed = {}, tensor_files.describe(tensors)
        for name, inside in tensor_files.shards(tensors).items():
            written[name] = files.write(partial / name, tensor_files.parts({t: tensors[t] for t in inside}))
            for tensor in inside:
                placed[tensor]["file"] = name
        for name, content in {**carried, STATE: manifests.canonical(state)}.items():
            written[name] = files.write(partial / name, [content])
        manifest = Manifest(run, step, time.time(), versions, facts, written, placed)
        files.write(partial / manifests.NAME, [manifest.encode()])
        sync_folder(partial)
        files.rename_new(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for name in written:
        files.forget(final / name)
    verify(final)
    return final


def inspect(path: Path) -> Manifest:
    """A checkpoint's manifest, after the cheap checks: it is whole, belongs here, and every file is there in its size.

    Raises:
        BadCheckpoint: it is not.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise BadCheckpoint("not a folder")
        manifest = manifests.decode(bytes(files.read(path / manifests.NAME, manifests.MAX_BYTES)))
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
        raise BadCheckpoint(str(error)) from error
    return manifest


def verify(path: Path) -> Manifest:
    """A checkpoint's manifest, after every byte of every file was hashed.

    Raises:
        BadCheckpoint: a byte is not the one that was saved.
    """
    manifest = inspect(path)
    for name, facts in manifest.files.items():
        _content(path, name, facts)
    return manifest


def load(path: Path) -> Loaded:
    """A checkpoint's content. What is hashed is what is used: no byte is read twice, and none is executed.

    Raises:
        BadCheckpoint: it is not what was saved.
    """
    manifest = inspect(path)
    tensors: dict[str, Tensor] = {}
    carried: dict[str, bytes] = {}
    for name, facts in manifest.files.items():
        content = _content(path, name, facts)
        if name.endswith(".safetensors"):
            try:
                tensors |= tensor_files.read(content)
            except (ValueError, KeyError, TypeError) as error:
                raise BadCheckpoint(f"{name}: {error}") from error
        else:
            carried[name] = bytes(content)
    if tensor_files.describe(tensors) != {
        name: {"dtype": t["dtype"], "shape": t["shape"]} for name, t in manifest.tensors.items()
    }:
        raise BadCheckpoint("its tensors are not those of its manifest")
    state = manifests.parse(carried.pop(STATE))
    return Loaded(path, manifest.step, manifest, tensors, state, carried)


def _content(path: Path, name: str, facts: Mapping[str, Any]) -> bytearray:
    try:
        content = files.read(path / name, int(facts["size"]))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{name}: {error}") from error
    if len(content) != facts["size"] or xxhash.xxh3_128_hexdigest(content) != facts["xxh3_128"]:
        raise BadCheckpoint(f"{name} is not what was saved: its hash differs")
    return content
