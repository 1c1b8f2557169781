"""Layers that draw no weights when they are made: `Backbone.init_weights` draws all of them, once and in one order.

So a backbone made on the meta device and filled later gets the weights of one made in place, and a large one is not
drawn twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """torch's, without weights yet."""

    def reset_parameters(self) -> None:
        """Nothing: see above."""


class Embedding(nn.Embedding):
    """torch's, without weights yet."""

    def reset_parameters(self) -> None:
        """Nothing: see above."""

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(ids, self.weight)


def look_up(ids: Tensor, table: Tensor, padding: int | None = None) -> Tensor:
    """The rows (..., D) of `table` (V, D) that `ids` (...) name. The row `padding` learns nothing.

    The gradient of a row that several ids name is a sum, whose order torch's compiler leaves to whichever thread comes
    first: then no run is like another to the bit. Compiled or not, the sum here is the one that torch makes without it.
    """
    if not torch.compiler.is_compiling():
        return F.embedding(ids, table, padding)
    found: Tensor = _LookUp.apply(ids, table, padding)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = table.shape[0], -1 if padding is None else padding  # as torch's kernel says none
        return F.embedding(ids, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        return None, _gradient(upstream[0], ids, ctx.rows, ctx.padding), None


@torch.library.custom_op("trainkit::embedding_gradient", mutates_args=())  # which a compiler calls and does not rewrite
def _gradient(upstream: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(upstream, ids, rows, padding, False)


@_gradient.register_fake
def _(upstream: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    return upstream.new_empty(rows, upstream.shape[-1])
