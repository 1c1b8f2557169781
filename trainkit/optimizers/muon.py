"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices inside blocks, AdamW for the rest."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from trainkit.config import Fraction, NonNegative, Positive, config
from trainkit.optimizers.adamw import Beta
from trainkit.optimizers.groups import decay_groups


@config
class Muon:
    """`lr` moves the blocks' matrices, scaled so that an update is as large as AdamW's (Liu et al. 2025,
    arXiv:2502.16982); `adamw_lr` moves embeddings, head, gains and biases."""

    kind: Literal["muon"] = "muon"
    lr: Positive
    adamw_lr: Positive
    momentum: Fraction = 0.95
    nesterov: bool = True
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegative = 0.1

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer of the parameters that learn."""
        inside = {
            name: p
            for name, p in model.named_parameters()
            if ".blocks." in f".{name}" and p.ndim == 2 and p.requires_grad
        }
        rest = [p for name, p in model.named_parameters() if name not in inside]
        muon = torch.optim.Muon(
            list(inside.values()),
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            decay_groups(rest, self.adamw_lr, self.weight_decay), lr=self.adamw_lr, betas=self.betas, fused=True
        )
        return Both(muon, adamw)


class Both(torch.optim.Optimizer):
    """Two optimizers as one. Groups and state are theirs, not copies."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = first, second
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.param_groups = [*first.param_groups, *second.param_groups]
        ours = {p for g in first.param_groups for p in g["params"]}
        self.state = _Chained(first.state, second.state, of_first=ours)  # type: ignore[assignment]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


class _Chained(dict[Any, Any]):
    """The state of the optimizer that a parameter belongs to."""

    def __init__(self, first: Any, second: Any, of_first: set[Any]) -> None:
        super().__init__()
        self._first, self._second, self._of_first = first, second, of_first

    def _of(self, key: Any) -> Any:
        return self._first if key in self._of_first else self._second

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __contains__(self, key: Any) -> bool:
        return key in self._of(key)
