"""The number format in which gradients are added up over microbatches, and kept until the step.

Grade: exact for the format of the parameters, approximate for a narrower one.
"""

from typing import Any

import torch
from torch import nn


def check(name: str, *, optimizer: Any, precision: Any, parallel: Any, deterministic: str, **_: Any) -> None:
    """Raise ValueError where gradients of that format make no sense."""
    if precision.params == "float64":
        raise ValueError(f"memory.grad_dtype={name} would round what precision.params=float64 keeps: set it to null")
    if name == precision.params:
        return
    if parallel.shards:
        raise ValueError(f"parallel=fsdp keeps gradients in the parameters' format: memory.grad_dtype={name} must go")
    if deterministic == "elastic":
        raise ValueError(f"deterministic=elastic adds gradients up as integers: memory.grad_dtype={name} must go")
    if optimizer.kind == "muon":
        raise ValueError(f"optimizer=muon takes gradients in its parameters' format: memory.grad_dtype={name} must go")


def accumulate_in(model: nn.Module, name: str) -> nn.Module:
    """`model` whose gradients autograd casts to that format as they come, and adds up in it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = getattr(torch, name)
    return model
