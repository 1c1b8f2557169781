"""Rows of texts going through a model, without a graph and again with one, and the rows of all ranks in one place.

B a rank's rows, N those of all ranks, P texts a row, K vector width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.tasks.embedding_loss import Rows


@dataclass
class Passes:
    """A rank's rows going through the model, `rows` of one column of texts at a time, and again with a graph."""

    model: nn.Module
    batch: Mapping[str, Tensor]
    rows: int
    exact: Any

    def __post_init__(self) -> None:
        self.count, columns = self.batch["lengths"].shape
        begins = range(0, self.count, self.rows)
        self.parts = [(column, slice(a, min(a + self.rows, self.count))) for a in begins for column in range(columns)]
        self.whole = self.rows == self.count and not self.exact
        self.seeds = torch.randint(1 << 62, (len(self.parts),)).tolist() if self.model.training else []

    def once(self, *, graph: bool) -> Tensor:
        """The vectors (B, P, K) of all rows."""
        with torch.set_grad_enabled(graph):
            found = [self.vectors(number) for number in range(len(self.parts))]
        columns = self.batch["lengths"].shape[1]
        return torch.stack([torch.cat(found[column::columns]) for column in range(columns)], 1)

    def vectors(self, number: int) -> Tensor:
        """What the model gives for a part. The same is drawn each time."""
        column, some = self.parts[number]
        if self.exact and column == 0:
            self.exact.begin_row(some.start)
        elif self.seeds and not self.exact:
            torch.manual_seed(self.seeds[number])
        lengths = self.batch["lengths"][some, column]
        tokens = self.batch[f"tokens{column}"][some]
        if self.exact:  # what a row is padded to depends on the rows beside it
            tokens = tokens[:, : int(lengths.max())]
        vectors: Tensor = self.model(tokens, lengths)
        return vectors

    def again(
        self, gradient: Tensor, scale: Callable[[Tensor], Tensor], ranks: Any, share: Tensor | None, kept: Any = None
    ) -> None:
        """Push the gradient (B, P, K) by the vectors through the model, into the parameters. `kept` are the vectors
        where they have a graph; `share` is what a row adds to exact sums."""
        if self.whole:
            ranks.sum_next(self.model, last=True)
            ranks.pace.forward_done()
            scale((kept * gradient).sum()).backward()
            return
        for number, (column, some) in enumerate(self.parts):
            last = number == len(self.parts) - 1
            ranks.sum_next(self.model, last=last)
            vectors = self.vectors(number)
            if last:
                ranks.pace.forward_done()
            scale((vectors * gradient[some, column]).sum()).backward()
            if self.exact and column == gradient.shape[1] - 1:
                self.exact.take(share)


def gathered(ranks: Any, vectors: Tensor, batch: Mapping[str, Tensor]) -> Rows:
    """The rows of all ranks, in the order of the global batch."""
    more = {name: places(ranks, batch[name]) for name in ("scores", "teacher") if name in batch}
    return Rows(places(ranks, vectors), places(ranks, batch["texts"]), **more)


def places(ranks: Any, tensor: Tensor) -> Tensor:
    """Every rank's `tensor` (B, ...) as one (N, ...), by rank. The sum adds nothing but zeros, and so it is exact."""
    if ranks.size == 1:
        return tensor
    whole = tensor.new_zeros(ranks.size * len(tensor), *tensor.shape[1:])
    whole[ranks.rank * len(tensor) : (ranks.rank + 1) * len(tensor)] = tensor
    summed: Tensor = ranks.sum(whole)
    return summed
