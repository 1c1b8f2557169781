"""Optimizers: `build(model)` makes one, `step` makes an update unless it must not be made.

Every group of a built optimizer carries its peak learning rate; the learner scales it by the schedule.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.optimizers.adamw import AdamW
from trainkit.optimizers.in_backward import InBackward, step
from trainkit.optimizers.low_bit import Keeping
from trainkit.optimizers.muon import Muon
from trainkit.optimizers.offloaded import Offloaded
from trainkit.optimizers.rounding import Rounding, Wide, rounded
from trainkit.optimizers.sgd import SGD

Optimizer = AdamW | SGD | Muon

__all__ = ["SGD", "AdamW", "InBackward", "Muon", "Optimizer", "begin", "build", "step", "total_norm"]


def begin(optimizer: torch.optim.Optimizer, key: int) -> None:
    """Say which step comes, by a number of its own: what its updates draw is a function of that."""
    if isinstance(optimizer, Wide):
        optimizer.key = key
    for part in getattr(optimizer, "parts", ()):
        begin(part, key)


def build(
    config: Optimizer, model: nn.Module, memory: Any, *, compiled: bool, rounding: Rounding | None = None
) -> torch.optim.Optimizer:
    """An optimizer of `model` whose states and step are as `memory` says (`states`, `offload_optimizer`,
    `step_in_backward`), and whose updates of bfloat16 parameters are written by `rounding`. Steps of our own are
    `compiled` on request, and on a GPU always."""
    if rounding is not None:
        return rounded(config.build(model), model, rounding)
    odd = any(p.grad_dtype not in (None, p.dtype) for p in model.parameters())  # torch's kernels take no such gradients
    make = config.build
    if memory.states or odd:
        on_gpu = any(p.device.type == "cuda" for p in model.parameters()) and not memory.offload_optimizer
        keeping = Keeping(memory.states and memory.states.format, compiled or on_gpu)
        make = partial(config.build, keeping=keeping)
    if memory.offload_optimizer:
        return Offloaded(model, make)
    return InBackward(make(model)) if memory.step_in_backward else make(model)


def total_norm(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, in at least float32: those that are there, or those that the backward has used up."""
    if isinstance(optimizer, InBackward):
        return torch.nn.utils.get_total_norm(optimizer.norms())
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(grad.dtype.itemsize < 4 for grad in grads):
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
    return torch.nn.utils.get_total_norm(grads)
