"""Fully sharded data parallelism, torch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277): every rank holds a slice of every
parameter, and a block is put together just before it is used. Hybrid: over some ranks slices, over others replicas of them.

Grade: reordered.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from trainkit.parallel.waits import Waits


def shard(
    model: nn.Module,
    mesh: Any,
    device: torch.device,
    *,
    roots: Sequence[nn.Module] = (),
    stream: bool = False,
    reshard: bool | int = True,
    prefetch: int | None = None,
) -> nn.Module:
    """`model`, in place, with every block and then the rest (or each of `roots`) sharded over `mesh`. Gradients are summed,
    not averaged: the task divides.

    Args:
        stream: the slices live on the host, pinned where there is a GPU.
        reshard: whether a block is taken apart after its forward; a number of ranks over which it then lies.
        prefetch: how many blocks ahead are put together (None: as FSDP2 sees fit).
    """
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if stream else OffloadPolicy()
    blocks = list(model.backbone.blocks)  # type: ignore[union-attr, arg-type]  # a ModuleList
    for block in blocks:
        fully_shard(block, mesh=mesh, offload_policy=offload, reshard_after_forward=reshard)
    for root in roots or (model,):
        fully_shard(root, mesh=mesh, offload_policy=offload)
    for number, block in enumerate(blocks):
        if prefetch is not None:
            block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(0, number - prefetch) : number][::-1])
    for module in (m for root in roots or (model,) for m in root.modules()):
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    if stream:
        waits = Waits([*(roots or (model,)), *blocks], device)
        model.memory_stats = [*getattr(model, "memory_stats", []), waits.stats]  # type: ignore[assignment]
    return model
