"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices inside blocks, AdamW for the rest."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.config import Fraction, NonNegative, Positive, config
from trainkit.optimizers import formats, low_bit, sharded
from trainkit.optimizers.adamw import Beta
from trainkit.optimizers.groups import decay_groups
from trainkit.optimizers.low_bit import Keeping, LowBit
from trainkit.optimizers.sharded import format_of

EPS = 1e-8


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

    def build(self, model: nn.Module, keeping: Keeping | None = None) -> torch.optim.Optimizer:
        """An optimizer of the parameters that learn; `keeping` says how its states are kept."""
        inside = {
            name: p
            for name, p in model.named_parameters()
            if ".blocks." in f".{name}" and p.ndim == 2 and p.requires_grad
        }
        rest = [p for name, p in model.named_parameters() if name not in inside]
        of_muon: dict[str, Any] = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
        }
        groups = decay_groups(rest, self.adamw_lr, self.weight_decay)
        if keeping is not None:
            adamw = low_bit.adamw(*self.betas, EPS)
            return Both(LowBitMuon(list(inside.values()), keeping, **of_muon), LowBit(groups, adamw, keeping))
        return Both(
            WholeMuon(list(inside.values()), **of_muon),
            torch.optim.AdamW(groups, lr=self.adamw_lr, betas=self.betas, eps=EPS, fused=True),
        )


class WholeMuon(torch.optim.Muon):
    """torch's Muon, also of matrices that lie on several ranks in slices: each is put together to be orthogonalised, on all of
    them, and a rank uses its own slice of what comes out. Left to themselves slices would be multiplied slice by slice, and
    the sums be rounded to bfloat16 in another way on any number of ranks.

    Grade: reordered; what reaches the orthogonalisation, which is in bfloat16, differs by the order of gradients' sums only.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, p.grad, group)

    def _step_one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        momentum = self.state[p]["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = orthogonal(sharded.whole(p, update), group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        sharded.local(p).add_(sharded.part(p, whole), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U Vᵀ of a matrix U S Vᵀ, in bfloat16, by Newton and Schulz's iteration with Jordan's coefficients."""
    a, b, c = coefficients
    x = matrix.bfloat16()
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x


class LowBitMuon(WholeMuon):
    """Muon whose momentum is kept in few bits. One matrix after the other is decoded, stepped and encoded:
    orthogonalisation needs it whole."""

    def __init__(self, parameters: list[nn.Parameter], keeping: Keeping, **of_muon: Any) -> None:
        super().__init__(parameters, **of_muon)
        self.keeping = keeping

    def format_of(self, parameter: Tensor) -> str | None:
        """The format that this parameter's states are kept in."""
        return self.keeping.format if formats.fits(parameter) else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p] = sharded.state_in(None, p, self.state[p])
                        self.param_groups = [{**group, "params": [p]}]
                        super().step()
                        self.state[p] = sharded.state_in(self.format_of(p), p, self.state[p])
        finally:
            self.param_groups = groups


class Both(torch.optim.Optimizer):
    """Two optimizers as one. Groups and state are theirs, not copies."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = first, second
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.param_groups = [*first.param_groups, *second.param_groups]
        ours = {p for g in first.param_groups for p in g["params"]}
        self.state = _Chained(first.state, second.state, of_first=ours)  # type: ignore[assignment]

    def format_of(self, parameter: Tensor) -> str | None:
        """The format that this parameter's states are kept in."""
        return format_of(self.parts[parameter not in self.state.of_first], parameter)  # type: ignore[attr-defined]

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
        self._first, self._second, self.of_first = first, second, of_first

    def _of(self, key: Any) -> Any:
        return self._first if key in self.of_first else self._second

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __contains__(self, key: Any) -> bool:
        return key in self._of(key)
