"""Context parallelism: ranks share a row's positions. Each computes with its own queries and with the keys and values of all
positions before them, which it gathers layer by layer (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).

Grade: reordered. Document masks and windows are kept: a rank's mask is its rows of the whole one. Later parts of a row see
more and take longer.
"""

from typing import Any

from torch import Tensor, nn

from trainkit.parallel.collectives import Gather, Sum


class Positions:
    """The ranks that share each row's positions."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self._end: int | None = None

    def part(self, length: int) -> slice:
        """This rank's positions of a row. The next forward and its backward are of those."""
        each = length // self.size
        self._end = (self.rank + 1) * each
        return slice(self.rank * each, self._end)

    def whole(self) -> None:
        """The next forward is of whole rows."""
        self._end = None

    def sum(self, loss: Tensor) -> Tensor:
        """The whole rows' loss, of which every rank has its positions' part."""
        return Sum.apply(loss, self.group)

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T/n, K) of this rank's positions to those of all up to its last one."""
        if self._end is None:
            return k, v
        k, v = (Gather.apply(x, 2, self.group)[:, :, : self._end] for x in (k, v))
        return k, v


def spread(model: nn.Module, positions: Positions) -> None:
    """Make `model` compute this rank's positions, in place."""
    model.positions = positions  # type: ignore[assignment]  # not a module
    for block in model.backbone.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.attention.elsewhere = positions.seen
