"""Batches of pairs as a function of (step, seed, ranks): texts of similar length together, each batch from one source.

B a rank's rows, P texts a row, T positions. Rows are sorted by length into buckets once; the order of an epoch's
batches and of the rows in each bucket are permutations that take no memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainkit.data.loader import SOURCE_BITS
from trainkit.data.order import Shares, permuted
from trainkit.data.pair_table import MISSING, Ends, PairTable
from trainkit.errors import UserError

BATCHES = 4  # of which a bucket has as many at least


@dataclass
class Part:
    """Rows of a table, by `places` or all of them."""

    table: PairTable
    places: NDArray[np.int64]


class Buckets:
    """The rows of one source by length. Each bucket has its own number of rows a batch: `batch`, halved as long as a
    batch would have more than `tokens` ids with padding."""

    def __init__(self, part: Part, ends: Ends, *, length: int, batch: int, tokens: int | None, buckets: int) -> None:
        lengths = part.table.lengths(length, ends.extra)[part.places]
        self.tokens = int(lengths.sum())
        key = lengths.max(1)
        count = max(1, min(buckets, len(key) // (BATCHES * batch)))
        order = np.argsort(key, kind="stable") if count > 1 else np.arange(len(key))
        self.order = part.places[order]
        edges = np.linspace(0, len(key), count + 1).astype(np.int64)
        self.begins, self.sizes = edges[:-1], np.diff(edges)
        widest = [int(key[order[a:b]].max(initial=1)) * lengths.shape[1] for a, b in pairwise(edges)]
        self.rows = [_halved(batch, wide, tokens) for wide in widest]
        self.ends = np.cumsum(self.sizes // self.rows)

    @property
    def batches(self) -> int:
        """How many batches an epoch has. What is left over in a bucket is another rest in every epoch."""
        return int(self.ends[-1])

    def at(self, place: int, key: tuple[int, ...]) -> NDArray[np.int64]:
        """The rows of the batch at this place of the endless order."""
        epoch, index = divmod(place, self.batches)
        mixed = int(permuted(np.array([index]), self.batches, (*key, epoch, -1))[0])
        bucket = int(np.searchsorted(self.ends, mixed, side="right"))
        number = mixed - (int(self.ends[bucket - 1]) if bucket else 0)
        rows = self.rows[bucket]
        inside = permuted(np.arange(number * rows, (number + 1) * rows), int(self.sizes[bucket]), (*key, epoch, bucket))
        return self.order[self.begins[bucket] + inside]


def _halved(batch: int, wide: int, tokens: int | None) -> int:
    while tokens is not None and batch > 1 and batch * wide > tokens:
        batch = -(-batch // 2)
    return batch


class PairLoader:
    """`at(step)` is one rank's share of a step's batch, on the device."""

    def __init__(
        self,
        train: Sequence[Part],
        validation: Sequence[Part],
        weights: Sequence[float],
        ends: Ends,
        *,
        seed: int,
        length: int,
        batch: int,
        tokens: int | None,
        buckets: int,
        ranks: Any,
        device: torch.device,
    ) -> None:
        self._train, self._validation, self._ends = list(train), list(validation), ends
        self._length, self._seed, self._ranks, self._device = length, seed, ranks, device
        self.batch = batch
        self._buckets = [
            Buckets(part, ends, length=length, batch=batch, tokens=tokens, buckets=buckets) for part in train
        ]
        for part, found in zip(train, self._buckets, strict=True):
            if not found.batches:
                raise UserError(
                    f"{part.table.name} has {len(part.places)} rows, which is no batch of {batch}: lower data.batch"
                )
            if uneven := [rows for rows in found.rows if rows % ranks.size]:
                raise UserError(
                    f"batches of {uneven[0]} rows do not divide over {ranks.size} ranks: use a data.batch that does, however "
                    f"often data.tokens halves it"
                )
        self._shares = Shares(list(weights)) if len(self._train) > 1 else None
        self._batches = sum(found.batches for found in self._buckets)
        self.tokens_per_step = round(sum(found.tokens for found in self._buckets) / self._batches)

    def at(self, step: int) -> dict[str, Tensor]:
        """The batch of the update that follows `step` updates."""
        source, place = 0, step
        if self._shares is not None:
            sources, places = self._shares.at(np.array([step]), (self._seed, -1))
            source, place = int(sources[0]), int(places[0])
        rows = self._buckets[source].at(place, (self._seed, source))
        return self._batch(self._train[source].table, self._mine(rows), source)

    def validation(self, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The validation rows in order, `limit` global batches of each table at most; the last one of each is filled
        with empty rows."""
        for part in self._validation:
            batches = -(-len(part.places) // self.batch)
            for i in range(batches if limit is None else min(limit, batches)):
                rows = part.places[i * self.batch : (i + 1) * self.batch]
                filled = np.pad(rows, (0, self.batch - len(rows)), constant_values=-1)
                yield self._batch(part.table, self._mine(filled), 0)

    def epoch(self, step: int) -> float:
        """How often all batches have been seen after `step` updates."""
        return step / self._batches

    def close(self) -> None:
        """Nothing: there is no worker."""

    def _mine(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        each = len(rows) // self._ranks.size
        return rows[self._ranks.rank * each : (self._ranks.rank + 1) * each]

    def _batch(self, table: PairTable, rows: NDArray[np.int64], source: int) -> dict[str, Tensor]:
        """The rows of these places; a place of -1 is an empty row."""
        real = rows >= 0
        texts = np.where(real[:, None], table.rows[rows], MISSING).astype(np.int64)
        arrays: dict[str, Any] = {"ids": np.where(real, rows | (source << SOURCE_BITS), -1), "texts": texts}
        lengths = []
        for column in range(texts.shape[1]):
            ids = [self._text(table, int(text)) for text in texts[:, column]]
            sizes = np.array([len(one) for one in ids])
            padded = np.full((len(ids), int(sizes.max())), self._ends.empty, dtype=np.int64)
            padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.concatenate(ids)
            arrays[f"tokens{column}"] = padded
            lengths.append(sizes)
        arrays["lengths"] = np.stack(lengths, 1)
        if table.scores is not None:
            arrays["scores"] = np.where(real, table.scores[rows], 0).astype(np.float32)
        if table.teacher is not None:
            arrays["teacher"] = np.where(real[:, None, None], table.teacher[rows], 0).astype(np.float32)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if self._device.type == "cpu":
            return tensors
        return {name: t.pin_memory().to(self._device, non_blocking=True) for name, t in tensors.items()}

    def _text(self, table: PairTable, text: int) -> list[int]:
        if text == MISSING:
            return [self._ends.empty]
        return self._ends.whole(table.ids[table.starts[text] : table.starts[text + 1]], self._length)
