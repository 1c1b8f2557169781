"""An optimizer that makes each parameter's update in the backward, as soon as its gradient is there, and frees the
gradient: never more than one is held (LOMO, Lv et al. 2024, arXiv:2306.09782, with any optimizer)."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainkit.optimizers.sharded import format_of


class InBackward(torch.optim.Optimizer):
    """`inner`, stepped in the backward. `norms` are those of the last backward's gradients, in the order of `parameters`.

    From the first gradient that is not finite no update is made any more, until `step`, which is called after the
    backward, is told by `found_inf` that all is well. A gradient that is finite behind it and not before it leaves the
    layers behind it updated: then `torn` is 1, and the weights are those of no step.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.parameters = [p for group in inner.param_groups for p in group["params"]]
        self._norms: dict[Tensor, Tensor] = {}
        self._zero = torch.zeros((), device=self.parameters[0].device)
        self._stopped = self.torn = self._updated = self._zero
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def format_of(self, parameter: Tensor) -> str | None:
        """The format that this parameter's states are kept in."""
        return format_of(self.inner, parameter)

    def reread(self) -> None:
        """Other weights: what was wrong with those before is forgotten."""
        self._stopped = self.torn = self._updated = self._zero
        self._norms = {}

    def norms(self) -> list[Tensor]:
        """The norms of the last backward's gradients, in no order that depends on timing; they are forgotten."""
        found, self._norms = [self._norms[p] for p in self.parameters if p in self._norms], {}
        return found

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad)
        self._norms[parameter] = norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        before = self._stopped
        self._stopped = torch.maximum(self._stopped, (~torch.isfinite(norm)).float())
        self.torn = torch.maximum(self.torn, (self._stopped - before) * self._updated)
        step(self.inner, self._stopped)
        self._updated = 1 - self._stopped
        parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """All is done already; the next backward's updates are made unless `found_inf` is 1."""
        self._stopped = self._zero if self.found_inf is None else self.found_inf
        self._updated = self._zero


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
