"""Sequences of different lengths laid into rows of one length, several to a row: best fit, the longest first.

B rows, T positions. What a row holds does not depend on the seed; the order of the rows does.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainkit.data.order import permuted

IGNORED = -100
Numpy = NDArray[np.int64]


@dataclass
class Sequences:
    """Sequences end to end: `ids`, whether each is `learned`, and where each sequence begins (one more than there are)."""

    ids: NDArray[np.uint32]
    learned: NDArray[np.bool_]
    begins: Numpy

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Numpy:
        return np.diff(self.begins)


@dataclass
class PackedRows:
    """Rows of `length` tokens, each of one or several sequences, which do not see each other."""

    sequences: Sequences
    token_bytes: NDArray[np.int32]
    eos: int
    length: int
    seed: int
    pack: bool = True

    def __post_init__(self) -> None:
        lengths = np.minimum(self.sequences.lengths, self.length)
        self.rows = packed(lengths, self.length) if self.pack else [[i] for i in range(len(lengths))]
        self.splits, self.sizes = [self.sequences], [len(self.rows)]

    def shuffled(self, positions: Numpy) -> Numpy:
        """The sample ids at these places of the endless training order: every epoch is a new permutation."""
        ids, size = np.empty_like(positions), self.sizes[0]
        for epoch in np.unique(positions // size):
            here = positions // size == epoch
            ids[here] = permuted(positions[here] % size, size, (self.seed, 0, int(epoch)))
        return ids

    def batch(self, ids: Numpy) -> dict[str, Tensor]:
        """The rows of these samples; an id of -1 is an empty row, whose labels are all -100. A sequence that is longer than
        a row ends where the row does."""
        shape = (len(ids), self.length)
        tokens, labels = np.full(shape, self.eos, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32)
        for row, sample in enumerate(ids):
            place = 0
            for number, i in enumerate(self.rows[sample] if sample >= 0 else []):
                begin = int(self.sequences.begins[i])
                count = min(int(self.sequences.begins[i + 1]) - begin, self.length)
                end = place + count
                own = self.sequences.ids[begin : begin + count].astype(np.int64)
                tokens[row, place:end] = own
                learned = self.sequences.learned[begin + 1 : begin + count]
                labels[row, place : end - 1] = np.where(learned, own[1:], IGNORED)
                documents[row, place:end] = number
                place = end
                documents[row, place:] = number + 1
        sizes = np.where(labels == IGNORED, 0, self.token_bytes[np.maximum(labels, 0)])
        batch = {"tokens": tokens, "labels": labels, "ids": ids, "bytes": sizes.sum(1, dtype=np.int64)}
        if self.pack:
            batch["documents"] = documents
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def packed(lengths: Sequence[int] | Numpy, room: int) -> list[list[int]]:
    """Which sequences go into each row of `room` tokens. Each goes into the fullest row that still has room for it."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what is left of a row, and the row, sorted
    for i in order:
        size = int(lengths[i])
        at = bisect_left(free, (size, -1))
        if at == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(at)
        rows[row].append(int(i))
        insort(free, (left - size, row))
    return rows
