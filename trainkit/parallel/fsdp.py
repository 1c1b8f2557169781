"""Fully sharded data parallelism, torch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277): every rank holds a slice of every
parameter, and a block is put together just before it is used.

Grade: reordered.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard


def shard(model: nn.Module, device: torch.device, size: int, *, stream: bool = False) -> nn.Module:
    """`model`, in place, with every block and then the rest sharded over all ranks. Gradients are summed, not averaged:
    the task divides. With `stream` the slices live on the host, pinned where there is a GPU."""
    mesh = init_device_mesh(device.type, (size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if stream else OffloadPolicy()
    for block in model.backbone.blocks:  # type: ignore[union-attr]  # a ModuleList
        fully_shard(block, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return model
