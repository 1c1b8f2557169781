"""Optimizers: `build(model)` makes one, `step` makes an update unless it must not be made.

Every group of a built optimizer carries its peak learning rate; the learner scales it by the schedule.
"""

import torch
from torch import Tensor

from trainkit.optimizers.adamw import AdamW
from trainkit.optimizers.muon import Muon
from trainkit.optimizers.rounding import Wide, rounded
from trainkit.optimizers.sgd import SGD

Optimizer = AdamW | SGD | Muon

__all__ = ["SGD", "AdamW", "Muon", "Optimizer", "begin", "rounded", "step"]


def begin(optimizer: torch.optim.Optimizer, key: int) -> None:
    """Say which step comes, by a number of its own: what its updates draw is a function of that."""
    if isinstance(optimizer, Wide):
        optimizer.key = key
    for part in getattr(optimizer, "parts", ()):
        begin(part, key)


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Make an update, unless `skip` (a float32 scalar on the device) is 1: then weights and state stay bitwise the same.

    The fused kernels look at `skip` on the device, through what they offer to `torch.amp.GradScaler`; for others the
    host has to wait and ask.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()
