"""A machine that computes wrongly without saying so: at one computation of one step, on one rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.learner import Learner

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "large": lambda x: x * 2.0**16,  # a flipped bit of the exponent
    "slight": lambda x: x * (1 + 2.0**-20),  # and of the mantissa
}


@dataclass(frozen=True)
class Fault:
    """At the computations `tries` of step `step` on `rank`, one number of an activation (`forward`), of its gradient
    (`backward`) or of a summed gradient (`summed`) is wrong."""

    step: int
    where: str = "forward"
    wrong: str = "nan"
    rank: int = 0
    tries: tuple[int, ...] = (0,)


@contextmanager
def machine(*faults: Fault) -> Iterator[list[int]]:
    """Inside, learners have these faults. Gives the steps that were computed, by their number before the update."""
    real, computed = Learner.compute, []

    def compute(self: Learner, batch: Any) -> Any:
        tries = computed.count(self.step)
        computed.append(self.step)
        now = [f for f in faults if f.step == self.step and f.rank == self.ranks.rank and tries in f.tries]
        hooks = [_hook(self, fault) for fault in now if fault.where != "summed"]
        clip = self.clip_gradients

        def clip_gradients() -> Any:
            for fault in now:
                if fault.where == "summed":
                    grad = self.parameters[0].grad
                    assert grad is not None
                    _spoil(grad, fault)
            return clip()

        self.clip_gradients = clip_gradients  # type: ignore[method-assign]
        try:
            return real(self, batch)
        finally:
            self.clip_gradients = clip  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    Learner.compute = compute  # type: ignore[method-assign]
    try:
        yield computed
    finally:
        Learner.compute = real  # type: ignore[method-assign]


def _hook(learner: Learner, fault: Fault) -> Any:
    fired = []

    def forward(module: Any, inputs: Any, hidden: Tensor) -> Tensor | None:
        if fired:
            return None
        fired.append(True)
        if fault.where == "backward":
            hidden.register_hook(lambda grad: _spoil(grad.clone(), fault))
            return None
        return _spoil(hidden.clone(), fault)

    return learner.model.backbone.norm.register_forward_hook(forward)  # type: ignore[union-attr, operator]


def _spoil(numbers: Tensor, fault: Fault) -> Tensor:
    local = numbers.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    flat = local.view(-1)
    place = int(flat.abs().argmax())
    flat[place : place + 1] = WRONG[fault.wrong](flat[place : place + 1])
    return numbers
