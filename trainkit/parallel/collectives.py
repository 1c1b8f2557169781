"""Collectives that autograd goes through. Each one's backward is another one's forward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has other names for these, and warns of the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered(x: Tensor, dim: int, group: Any) -> Tensor:
    """The ranks' parts of a tensor, side by side along `dim`."""
    parts = x.transpose(0, dim).contiguous()
    whole = torch.empty((parts.shape[0] * dist.get_world_size(group), *parts.shape[1:]), dtype=x.dtype, device=x.device)
    _all_gather(whole, parts, group=group)
    return whole.transpose(0, dim)


def scattered(x: Tensor, dim: int, group: Any) -> Tensor:
    """The sum of the ranks' tensors, of which each rank keeps its part along `dim`."""
    whole = x.transpose(0, dim).contiguous()
    part = torch.empty((whole.shape[0] // dist.get_world_size(group), *whole.shape[1:]), dtype=x.dtype, device=x.device)
    _reduce_scatter(part, whole, group=group)
    return part.transpose(0, dim).contiguous()


def summed(x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum of the ranks' tensors, or what else `op` makes of them."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


class Gather(torch.autograd.Function):
    """`apply(x, dim, group)`: put parts together. The gradients of the whole, which each rank has in part, are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scattered(grads[0], ctx.dim, ctx.group), None, None


class Scatter(torch.autograd.Function):
    """`apply(x, dim, group)`: sum what each rank has in part, and keep one's own part along `dim`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return scattered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gathered(grads[0], ctx.dim, ctx.group), None, None


class Sum(torch.autograd.Function):
    """`apply(x, group)`: the sum of what each rank has in part. Its gradient is known to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Copy(torch.autograd.Function):
    """`apply(x, group)`: what all ranks have, for parts of a computation. The parts' gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.group), None
