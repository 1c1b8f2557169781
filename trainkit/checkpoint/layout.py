"""Which part of which tensor lies in which file. A part is a box: where it begins in the whole tensor, and its shape.

What a rank holds may be a whole tensor or a slice of it; what is on the disk is boxes of the whole, so that any number of
ranks, however they slice, reads what any other wrote.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainkit.slices import chunks

SHARD_BYTES = 4 << 30
SMALL = 1 << 16  # bytes below which a box is not worth handing to another rank than the first that has it


@dataclass(frozen=True)
class Box:
    """A part of the tensor `name`."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """What it is called in a file."""
        return f"{self.name}@{','.join(map(str, self.offset))}" if any(self.offset) else self.name

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardFile:
    """A file of boxes, written by one rank."""

    name: str
    rank: int
    boxes: tuple[Box, ...]


def local_boxes(name: str, tensor: Any) -> list[tuple[Box, Tensor]]:
    """What this rank holds of a tensor."""
    return [(Box(name, offset, shape), values) for offset, shape, values in chunks(tensor)]


def plan(
    held: Sequence[Sequence[tuple[Box, int]]], packed: Sequence[str] = (), limit: int = SHARD_BYTES
) -> list[ShardFile]:
    """Which rank writes which boxes into which file. Every rank computes the same from what all of them hold.

    A box that several ranks hold is written by the one with the least to write. `held`: by rank, boxes and their bytes.
    Boxes of names that begin with one of `packed` go into files of their own, which end in `.zst`.
    """
    holders: dict[Box, list[int]] = {}
    sizes: dict[Box, int] = {}
    for rank, boxes in enumerate(held):
        for box, size in boxes:
            holders.setdefault(box, []).append(rank)
            sizes[box] = size
    load = [0] * len(held)
    mine: dict[tuple[int, bool], list[Box]] = {}
    for box, ranks in holders.items():
        writer = min(ranks, key=lambda r: (load[r], r)) if sizes[box] >= SMALL else ranks[0]
        load[writer] += sizes[box]
        mine.setdefault((writer, box.name.startswith(tuple(packed))), []).append(box)
    groups = [
        (rank, zipped, part) for (rank, zipped), boxes in sorted(mine.items()) for part in _cut(boxes, sizes, limit)
    ]
    return [
        ShardFile(f"shard-{i:05d}-of-{len(groups):05d}.safetensors{'.zst' if zipped else ''}", rank, tuple(part))
        for i, (rank, zipped, part) in enumerate(groups)
    ]


def _cut(boxes: Sequence[Box], sizes: Mapping[Box, int], limit: int) -> Iterator[list[Box]]:
    part: list[Box] = []
    size = 0
    for box in boxes:
        if part and size + sizes[box] > limit:
            yield part
            part, size = [], 0
        part.append(box)
        size += sizes[box]
    yield part


def describe(dtypes: Mapping[str, tuple[str, Sequence[int]]], files: Sequence[ShardFile]) -> dict[str, dict[str, Any]]:
    """What a manifest says of every tensor: dtype, shape, and its `parts`: file, offset, shape."""
    described: dict[str, dict[str, Any]] = {
        name: {"dtype": dtype, "shape": list(shape), "parts": []} for name, (dtype, shape) in dtypes.items()
    }
    for file in files:
        for box in file.boxes:
            described[box.name]["parts"].append([file.name, list(box.offset), list(box.shape)])
    return described


def boxes_by_file(described: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Box]]:
    """The boxes of every file by key, from what a manifest says.

    Raises:
        ValueError: the parts of a tensor do not make it up.
    """
    files: dict[str, dict[str, Box]] = {}
    for name, facts in described.items():
        shape, boxes = facts["shape"], []
        for file, offset, part in facts["parts"]:
            box = Box(name, tuple(offset), tuple(part))
            inside = len(offset) == len(part) == len(shape) and all(
                type(o) is int and type(n) is int and o >= 0 and n >= 0 and o + n <= whole
                for o, n, whole in zip(offset, part, shape)
            )
            if not inside or box.key in files.setdefault(file, {}):
                raise ValueError(f"a part of the tensor {name} is not inside it")
            files[file][box.key] = box
            boxes.append(box)
        if sum(box.numel for box in boxes) != math.prod(shape) or _overlapping(boxes):
            raise ValueError(f"the parts of the tensor {name} do not make it up")
    return files


def _overlapping(boxes: list[Box]) -> bool:
    """Whether two boxes of a tensor share a number. Slices along the first dimension, the usual case, are looked at in
    one pass."""
    if len(boxes) < 2:
        return False
    if len({(box.offset[1:], box.shape[1:]) for box in boxes}) == 1:
        ordered = sorted(boxes, key=lambda box: box.offset)
        return any(a.offset[0] + a.shape[0] > b.offset[0] for a, b in itertools.pairwise(ordered))
    return any(overlap(a, b) is not None for a, b in itertools.combinations(boxes, 2))


def overlap(part: Box, held: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where `part` and `held`, of one tensor, have the same numbers: the slices of each; None where they share none."""
    of_part, of_held = [], []
    for a, n, b, m in zip(part.offset, part.shape, held.offset, held.shape):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        of_part.append(slice(begin - a, end - a))
        of_held.append(slice(begin - b, end - b))
    return tuple(of_part), tuple(of_held)
