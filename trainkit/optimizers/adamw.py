"""AdamW: Decoupled Weight Decay Regularization (Loshchilov & Hutter 2019, arXiv:1711.05101), torch's fused kernel."""

from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import nn

from trainkit.config import NonNegative, Positive, config
from trainkit.optimizers import low_bit
from trainkit.optimizers.groups import decay_groups
from trainkit.optimizers.low_bit import Keeping, LowBit

Beta = Annotated[float, Interval(ge=0, lt=1)]


@config
class AdamW:
    """`betas` are those of large language models rather than of the paper (Brown et al. 2020, arXiv:2005.14165)."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1

    def build(self, model: nn.Module, keeping: Keeping | None = None) -> torch.optim.Optimizer:
        """An optimizer of the parameters that learn; `keeping` says how its states are kept."""
        groups = decay_groups(model.parameters(), self.lr, self.weight_decay)
        if keeping is not None:
            return LowBit(groups, low_bit.adamw(*self.betas, self.eps), keeping)
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=True)
