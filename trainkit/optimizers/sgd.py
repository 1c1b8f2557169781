"""Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

from typing import Literal

import torch
from torch import nn

from trainkit.config import Fraction, NonNegative, Positive, config
from trainkit.optimizers import low_bit
from trainkit.optimizers.groups import decay_groups
from trainkit.optimizers.low_bit import Keeping, LowBit


@config
class SGD:
    """What numeric tests train with: its update is as large as the gradient, so that a wrong scale shows."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")

    def build(self, model: nn.Module, keeping: Keeping | None = None) -> torch.optim.Optimizer:
        """An optimizer of the parameters that learn; `keeping` says how its states are kept."""
        groups = decay_groups(model.parameters(), self.lr, self.weight_decay)
        if keeping is not None:
            return LowBit(groups, low_bit.sgd(self.momentum, self.nesterov), keeping)
        # not fused: that kernel leaves its momentum uninitialised when the very first update is skipped
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, foreach=True)
