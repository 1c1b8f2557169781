"""Batches as a function of (step, seed, ranks): a loader's whole state is the step.

B a rank's rows, T positions. The global batch of a step does not depend on how many ranks or workers share it.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.data.order import Shares, permuted
from trainkit.data.shards import Split
from trainkit.errors import UserError

IGNORED = -100
SOURCE_BITS = 48  # a sample's id is its place in its source, with the source's number above these bits
Numpy = NDArray[np.int64]


@dataclass
class Rows:
    """Rows of `length` tokens cut from sources one after the other, and put into a global order."""

    splits: list[Split]
    weights: list[float]
    token_bytes: NDArray[np.int32]
    eos: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        self.sizes = [(split.tokens - 1) // self.length for split in self.splits]
        self.shares = Shares(self.weights) if len(self.splits) > 1 else None

    def shuffled(self, positions: Numpy) -> Numpy:
        """The sample ids at these places of the endless training order: every epoch of a source is a new permutation."""
        if self.shares is None:
            source, place = np.zeros_like(positions), positions
        else:
            source, place = self.shares.at(positions, (self.seed, -1))
        ids = np.empty_like(positions)
        for s, size in enumerate(self.sizes):
            for epoch in np.unique(place[source == s] // size):
                here = (source == s) & (place // size == epoch)
                ids[here] = permuted(place[here] % size, size, (self.seed, s, int(epoch))) | (s << SOURCE_BITS)
        return ids

    def batch(self, ids: Numpy) -> dict[str, Tensor]:
        """The rows of these samples; an id of -1 is an empty row, whose labels are all -100.

        Raises:
            UserError: a file holds an id that the tokenizer has not.
        """
        windows = np.full((len(ids), self.length + 1), self.eos, dtype=np.int64)
        for row, sample in enumerate(ids):
            if sample >= 0:
                split = self.splits[sample >> SOURCE_BITS]
                place = int(sample & ((1 << SOURCE_BITS) - 1))
                windows[row] = split.read(place * self.length, self.length + 1)
        try:
            sizes = self.token_bytes[windows]
        except IndexError as error:  # found for nothing, where it is looked up anyway
            raise self._foreign(ids, windows) from error
        tokens, following = windows[:, :-1], windows[:, 1:]
        ends = tokens == self.eos
        labels = np.where(ends, IGNORED, following)  # the next document is not to be guessed from this one
        batch = {"tokens": tokens, "labels": labels, "ids": ids}
        batch["bytes"] = np.where(ends, 0, sizes[:, 1:]).sum(1, dtype=np.int64)
        if ends[ids >= 0, :-1].any():
            documents = np.zeros(tokens.shape, dtype=np.int32)
            documents[:, 1:] = ends[:, :-1].cumsum(1)
            batch["documents"] = documents
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def _foreign(self, ids: Numpy, windows: Numpy) -> UserError:
        """What is wrong where a window holds an id beyond the tokenizer's."""
        vocab = len(self.token_bytes)
        row, column = (int(place[0]) for place in (windows >= vocab).nonzero())
        sample = int(ids[row])
        place = (sample & ((1 << SOURCE_BITS) - 1)) * self.length + column
        file, number = self.splits[sample >> SOURCE_BITS].where(place)
        return UserError(
            f"{file} holds the id {windows[row, column]} at position {number}, and its tokenizer has {vocab} ids: it is "
            f"damaged, or another tokenizer's; prepare it again"
        )


class _Steps(Dataset[dict[str, Tensor]]):
    """The batch of a step, for workers."""

    def __init__(self, rows: Rows, batch: int, rank: int, size: int) -> None:
        self.rows, self.batch, self.rank, self.size = rows, batch, rank, size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        mine = self.batch // self.size
        begin = step * self.batch + self.rank * mine
        return self.rows.batch(self.rows.shuffled(np.arange(begin, begin + mine)))


class Loader:
    """`at(step)` is one rank's share of a step's batch, on the device. `train` and `validation` are `Rows`, or do what
    these do."""

    def __init__(
        self, train: Any, validation: Any, *, batch: int, workers: int, ranks: Any, device: torch.device
    ) -> None:
        refuse_rows(batch, ranks.readers)
        for name, rows in (("training", train), ("validation", validation)):
            for split, size in zip(rows.splits, rows.sizes, strict=True):
                if size < 1:
                    raise UserError(
                        f"the {name} split has {split.tokens} tokens, which is no row of {rows.length}: "
                        f"use more text, a smaller data.length or another data.validation"
                    )
        self._train, self._validation, self.batch, self._workers = train, validation, batch, workers
        self._ranks, self._device = ranks, device
        self._steps = _Steps(train, batch, ranks.reader, ranks.readers)
        self._coming: Iterator[dict[str, Tensor]] | None = None
        self._next = -1
        self.tokens_per_step = batch * train.length

    def at(self, step: int) -> dict[str, Tensor]:
        """The batch of the update that follows `step` updates."""
        if self._workers == 0:
            return self._moved(self._steps[step])
        if self._coming is None or step != self._next:
            self._coming = self._prefetching(step)
        self._next = step + 1
        try:
            return self._moved(next(self._coming))
        except UserError as error:  # a worker's, with its whole traceback for a text
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None

    def validation(self, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The validation rows in order, `limit` global batches of them at most; the last one is filled with empty rows."""
        rows, mine = self._validation, self.batch // self._ranks.readers
        ids = np.concatenate([np.arange(n) | (s << SOURCE_BITS) for s, n in enumerate(rows.sizes)])
        batches = -(-len(ids) // self.batch)
        for i in range(batches if limit is None else min(limit, batches)):
            begin = i * self.batch + self._ranks.reader * mine
            here = ids[begin : begin + mine]
            yield self._moved(rows.batch(np.pad(here, (0, mine - len(here)), constant_values=-1)))

    def epoch(self, step: int) -> float:
        """How often all samples have been seen after `step` updates."""
        return step * self.batch / sum(self._train.sizes)

    def close(self) -> None:
        """End the workers."""
        if self._coming is not None:
            self._coming._shutdown_workers()  # type: ignore[attr-defined]  # else they end when Python collects it
            self._coming = None

    def _prefetching(self, start: int) -> Iterator[dict[str, Tensor]]:
        self.close()
        loader = DataLoader(
            self._steps,
            sampler=range(start, 1 << 62),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=2,
            pin_memory=self._device.type == "cuda",
            persistent_workers=True,
            multiprocessing_context="forkserver",
            worker_init_fn=_ignore_interrupts,
        )
        return iter(loader)

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._device.type == "cpu":
            return batch
        if self._workers == 0:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}


def refuse_rows(batch: int, readers: int) -> None:
    """Raise UserError where the rows of a batch do not divide over those that read them."""
    if batch % readers:
        near = [n for n in (batch // readers * readers, -(-batch // readers) * readers) if n]
        raise UserError(f"data.batch={batch} rows do not divide over {readers} ranks: use {near[0]} or {near[-1]}")


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business


def rows(splits: Sequence[Split], weights: Sequence[float], tokenizer: Any, length: int, seed: int) -> Rows:
    """Rows of `length` tokens from weighted sources."""
    return Rows(list(splits), list(weights), tokenizer.token_bytes(), tokenizer.eos, length, seed)
