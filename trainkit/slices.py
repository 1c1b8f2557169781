"""What a rank holds of a tensor that lies on several: where it is in the whole one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Chunk = tuple[tuple[int, ...], tuple[int, ...], Any]  # where it begins in the whole, its shape, and its numbers


@dataclass(frozen=True)
class Cut:
    """Which rows (`dim` 0) or columns (`dim` 1) of a tensor of `shape` one rank holds: `runs` of (begin, length) in the
    whole, which lie one after the other here."""

    shape: tuple[int, ...]
    dim: int
    runs: tuple[tuple[int, int], ...]

    @property
    def here(self) -> tuple[int, ...]:
        """The shape of what is here."""
        return (*self.shape[: self.dim], sum(n for _, n in self.runs), *self.shape[self.dim + 1 :])

    def beside(self, shape: Sequence[int]) -> "Cut":
        """The same cut of a whole tensor that lies beside this one with fewer columns, such as its codes or scales.

        Raises:
            ValueError: columns of the one do not begin where columns of the other do.
        """
        if self.dim == 0 or shape[-1] == self.shape[-1]:
            return Cut(tuple(shape), self.dim, self.runs)
        runs = [(begin * shape[-1] / self.shape[-1], n * shape[-1] / self.shape[-1]) for begin, n in self.runs]
        if any(not number.is_integer() for run in runs for number in run):
            raise ValueError(f"a cut of {self.shape[-1]} columns does not cut {shape[-1]}")
        return Cut(tuple(shape), self.dim, tuple((int(begin), int(n)) for begin, n in runs))


class Part:
    """As much of a tensor as a checkpoint asks for: a rank's `values`, which are a cut of a larger one, and may themselves
    lie on several ranks in slices (a DTensor)."""

    def __init__(self, values: Any, cut: Cut) -> None:
        self.values, self.cut = values, cut
        self.shape, self.ndim, self.dtype, self.device = cut.shape, len(cut.shape), values.dtype, values.device

    def detach(self) -> "Part":
        """Itself: it is for reading and writing only."""
        return self

    def chunks(self) -> list[Chunk]:
        """What this rank holds."""
        found = []
        for offset, shape, values in chunks(self.values):
            here, dim = 0, self.cut.dim
            for begin, length in self.cut.runs:
                first, last = max(here, offset[dim]), min(here + length, offset[dim] + shape[dim])
                if first < last:
                    place = [slice(0, n) for n in shape]
                    place[dim] = slice(first - offset[dim], last - offset[dim])
                    at = (*offset[:dim], begin + first - here, *offset[dim + 1 :])
                    of = (*shape[:dim], last - first, *shape[dim + 1 :])
                    found.append((at, of, _window(values, tuple(place))))
                here += length
        return found


def chunks(tensor: Any) -> list[Chunk]:
    """What this rank holds of a tensor. Of a DTensor (https://pytorch.org/docs/stable/distributed.tensor.html) that may
    be a slice, or nothing."""
    if isinstance(tensor, Part):
        return tensor.chunks()
    whole = tensor.detach()
    if not hasattr(whole, "to_local"):
        return [((0,) * whole.ndim, tuple(whole.shape), whole)]
    found = whole.__create_chunk_list__()  # what torch's own checkpoints ask a DTensor
    return [(tuple(c.offsets), tuple(c.sizes), whole.to_local()) for c in found if math.prod(c.sizes)]


def fill(place: Any, whole: Tensor) -> None:
    """Copy into a rank's part of a tensor what is its own of the whole one."""
    for offset, shape, values in chunks(place):
        values.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])


def _window(values: Any, place: tuple[slice, ...]) -> Any:
    return values[place] if isinstance(values, Tensor) else _Window(values, place)


class _Window:
    """A part of a place for numbers that is no tensor."""

    def __init__(self, values: Any, place: tuple[slice, ...]) -> None:
        self._values, self._place = values, place

    def __getitem__(self, place: tuple[slice, ...]) -> Any:
        return self._values[
            tuple(slice(a.start + b.start, a.stop + b.start) for a, b in zip(place, self._place, strict=True))
        ]


@dataclass(frozen=True)
class Layout:
    """How a model is divided over ranks, beyond what its DTensors say. `shapes`: of the whole model's tensors by name;
    `cuts`: those of which a rank has rows or columns; `here`: the names of those that this rank has."""

    shapes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, Cut]
    here: frozenset[str]
