"""Writing one checkpoint, all ranks together, so that it is there whole or not at all."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.atomic import sync_folder
from trainkit.checkpoint import files, layout, packed
from trainkit.checkpoint import manifest as manifests
from trainkit.checkpoint import tensors as tensor_files
from trainkit.checkpoint.layout import Box, ShardFile, local_boxes
from trainkit.checkpoint.manifest import BadCheckpoint, Manifest
from trainkit.checkpoint.store import PARTIAL, STATE, step_name
from trainkit.parallel import Group


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is to be saved. `held` is what this rank writes of it, by box; `local` all that it has."""

    step: int
    state: Mapping[str, Any]
    carried: Mapping[str, bytes]
    facts: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]
    shards: tuple[ShardFile, ...]
    held: Mapping[Box, Tensor]
    local: tuple[tuple[Box, torch.dtype], ...]

    def plan(self) -> "Draft":
        """The draft without its tensors, which would live on with it."""
        return replace(self, held=dict.fromkeys(self.held, torch.empty(0)))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor_files.DTYPES[facts["dtype"]].itemsize * torch.Size(facts["shape"]).numel()
            for facts in self.tensors.values()
        )


def draft(
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    carried: Mapping[str, bytes],
    facts: Mapping[str, Any],
    *,
    group: Group,
    packed_names: tuple[str, ...] = (),
    like: Draft | None = None,
) -> Draft:
    """Agree with the other ranks on who writes what, as in the draft `like` where the tensors are laid out as in it. They
    are still those of the model."""
    held = {box: part for name, tensor in tensors.items() for box, part in local_boxes(name, tensor)}
    local = tuple((box, part.dtype) for box, part in held.items())
    if like is not None and like.local == local:
        return replace(like, step=step, state=state, carried=carried, facts=facts, held={b: held[b] for b in like.held})
    said = {
        "boxes": [[box.name, box.offset, box.shape, part.nbytes] for box, part in held.items()],
        "tensors": {name: [tensor_files.dtype_name(t.dtype), list(t.shape)] for name, t in tensors.items()},
    }
    told = group.gather(said)
    by_rank = [[(Box(n, tuple(o), tuple(s)), size) for n, o, s, size in rank["boxes"]] for rank in told]
    shards = layout.plan(by_rank, packed_names)
    mine = {box for shard in shards if shard.rank == group.rank for box in shard.boxes}
    facts_of = {
        name: facts for rank in told for name, facts in rank["tensors"].items()
    }  # one stage has not all of them
    described = layout.describe(facts_of, shards)
    return Draft(
        step, state, carried, facts, described, tuple(shards), {b: t for b, t in held.items() if b in mine}, local
    )


def commit(
    folder: Path,
    run: str,
    it: Draft,
    *,
    group: Group,
    versions: Mapping[str, str],
    check_owner: Callable[[], None] = lambda: None,
    not_before: float = 0.0,
) -> Path:
    """Save a checkpoint, all ranks together. When this returns it is on the disk, under its final name, and was read back
    and verified before it got that name.

    Every file is written into a hidden folder, fsynced and read back, then the folder is fsynced; one rename that replaces
    nothing makes it visible, and an fsync of the parent keeps it so. What fails on one rank fails on all.

    Raises:
        OSError, BadCheckpoint, ElsewhereError: the disk refused something, or gave back something else, here or on
            another rank; nothing of this checkpoint is left to be found.
    """
    final = folder / step_name(it.step)
    partial = Path(group.first_does(lambda: str(_begun(folder, final))))
    try:
        written: dict[str, Any] = {}
        for of_rank in group.all_do(lambda: _write_shards(partial, it, group.rank)):
            written |= of_rank
        manifest = Manifest(run, it.step, max(time.time(), not_before), versions, it.facts, written, it.tensors)
        group.first_does(lambda: _finish(partial, final, it, manifest, check_owner))
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _begun(folder: Path, final: Path) -> Path:
    partial = folder / f"{PARTIAL}{final.name}-{os.getpid()}"
    partial.mkdir()
    return partial


def _write_shards(partial: Path, it: Draft, rank: int) -> dict[str, Any]:
    written = {}
    for shard in it.shards:
        if shard.rank == rank:
            parts = tensor_files.parts({box.key: it.held[box] for box in shard.boxes})
            if shard.name.endswith(packed.SUFFIX):
                parts = packed.pack(parts)
            written[shard.name] = _written(partial / shard.name, parts)
    return written


def _written(path: Path, parts: Any) -> dict[str, int | str]:
    """Write a file, and read it back from the disk."""
    facts = files.write(path, parts)
    files.forget(path)
    if files.hash_of(path, int(facts["size"])) != facts["xxh3_128"]:
        raise BadCheckpoint(f"{path.name} is not on the disk as it was written")
    return facts


def _finish(partial: Path, final: Path, it: Draft, manifest: Manifest, check_owner: Callable[[], None]) -> None:
    small = {
        name: _written(partial / name, [content])
        for name, content in {**it.carried, STATE: manifests.canonical(it.state)}.items()
    }
    whole = replace(manifest, files={**manifest.files, **small})
    _written(partial / manifests.NAME, [whole.encode()])
    sync_folder(partial)
    check_owner()
    files.rename_new(partial, final)
