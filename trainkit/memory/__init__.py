"""Ways to hold less. None may change what is learned: tests/memory holds each one to its grade.

The field order is the order of application. One file a strategy: `@config`, and `apply(model) -> model` where it is about
the model; those about the optimizer's step are carried out by `optimizers.build`.
"""

from dataclasses import fields
from typing import Any, Literal

from torch import nn

from trainkit.config import Count, config
from trainkit.memory import fused_loss
from trainkit.memory import grad_dtype as gradients
from trainkit.memory.checkpoint import Checkpoint, set_budget
from trainkit.memory.fused_loss import FusedLoss
from trainkit.memory.low_bit_states import LowBitStates
from trainkit.memory.offload_activations import OffloadActivations
from trainkit.memory.offload_optimizer import OffloadOptimizer
from trainkit.memory.step_in_backward import StepInBackward
from trainkit.memory.stream import Stream

_SAID = {
    "auto": "fused_loss where logits are large (reordered)",
    "on": "fused_loss (reordered)",
    "off": "",
}


@config
class Memory:
    """`microbatch` rows go through the model at once (null: all of a rank's; auto: as many as fit, found by trial), gradients
    are added up in `grad_dtype` (null: the parameters'), and any of the strategies."""

    microbatch: Count | Literal["auto"] | None = None
    grad_dtype: Literal["float32", "bfloat16"] | None = None
    checkpoint: Checkpoint | None = None
    offload_activations: OffloadActivations | None = None
    stream: Stream | None = None
    fused_loss: FusedLoss = "auto"
    states: LowBitStates | None = None
    offload_optimizer: OffloadOptimizer | None = None
    step_in_backward: StepInBackward | None = None

    def check(self, **run: Any) -> None:
        """Raise ValueError, in one sentence, where a strategy cannot do with the rest of a run."""
        if self.grad_dtype:
            gradients.check(self.grad_dtype, **run)
        own: dict[str, Any] = {
            "states": self.states,
            "offload_optimizer": self.offload_optimizer,
            "grad_dtype": self.grad_dtype,
        }
        own["step_in_backward"] = self.step_in_backward
        for name in [name for name, value in own.items() if value and run["precision"].rounding]:
            raise ValueError(
                f"precision.rounding={run['precision'].rounding} has a step of its own, in float32: memory.{name} must go, "
                f"or use precision=bf16"
            )
        for strategy in (self.checkpoint, self.stream, self.states, self.step_in_backward):
            if strategy:
                strategy.check(memory=self, **run)

    def apply(self, model: nn.Module, *, compiled: bool = False) -> nn.Module:
        """`model` with every chosen strategy, over `model.backbone.blocks`; parameter names stay."""
        if self.grad_dtype:
            model = gradients.accumulate_in(model, self.grad_dtype)
        if self.checkpoint:
            model = self.checkpoint.apply(model)
        else:
            set_budget(1.0)  # a model that was built before this one may have had another
        if self.offload_activations:
            model = self.offload_activations.apply(model, compiled=compiled)
        if self.stream:
            model = self.stream.apply(model)
        return fused_loss.apply(model, self.fused_loss)

    def describe(self) -> str:
        """The strategies and their grades of neutrality, for a person."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        told = [f"{getattr(s, 'said', name)} ({s.grade})" for name, s in chosen.items() if hasattr(s, "grade")]
        told += [f"gradients in {self.grad_dtype}"] if self.grad_dtype else []
        return " + ".join(filter(None, [*told, _SAID[self.fused_loss]])) or "baseline"

    def advice(self) -> str:
        """What a person can do whose step does not fit: what changes nothing first."""
        ways = ("checkpoint", "offload_activations", "offload_optimizer", "stream")
        free = [way for way in ways if getattr(self, way) is None]
        free += ["fused_loss"] if self.fused_loss == "off" else []
        free += ["8bit"] if self.states is None else []
        return f"memory={'+'.join(free)} hold less, any of them" if free else "choose a smaller model or data.length"


def stats(model: nn.Module) -> dict[str, float]:
    """What the strategies of `model` moved since the last call, and how long that was waited for."""
    return {name: value for told in getattr(model, "memory_stats", []) for name, value in told().items()}
