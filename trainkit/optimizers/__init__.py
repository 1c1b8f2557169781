"""Optimizers: `build(model)` makes one, `step` makes an update unless it must not be made.

Every group of a built optimizer carries its peak learning rate; the learner scales it by the schedule.
"""

import torch
from torch import Tensor

from trainkit.optimizers.adamw import AdamW
from trainkit.optimizers.muon import Both, Muon
from trainkit.optimizers.rounding import Wide, rounded
from trainkit.optimizers.sgd import SGD

Optimizer = AdamW | SGD | Muon

__all__ = ["SGD", "AdamW", "Muon", "Optimizer", "rounded", "step"]


def step(optimizer: torch.optim.Optimizer, skip: Tensor, key: int = 0) -> None:
    """Make an update, unless `skip` (a float32 scalar on the device) is 1: then weights and state stay bitwise the same.
    What an update draws is a function of `key`.

    The fused kernels look at `skip` on the device, through what they offer to `torch.amp.GradScaler`; for others the
    host has to wait and ask.
    """
    for part in optimizer.parts if isinstance(optimizer, Both) else [optimizer]:
        if isinstance(part, Wide):
            part.key = key
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()
