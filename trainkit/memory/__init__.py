"""Ways to hold less. None may change what is learned: tests/test_learning.py and tests/memory hold each one to its grade.

The field order is the order of application. One file a strategy: `@config`, and `apply(model) -> model` where it is about
the model; those about the optimizer's step are carried out by `optimizers.build`.
"""

from dataclasses import fields
from typing import Any, Literal

from torch import nn

from trainkit.config import Count, config
from trainkit.memory import grad_dtype as gradients
from trainkit.memory.checkpoint import Checkpoint
from trainkit.memory.low_bit_states import LowBitStates
from trainkit.memory.offload_activations import OffloadActivations
from trainkit.memory.offload_optimizer import OffloadOptimizer
from trainkit.memory.step_in_backward import StepInBackward


@config
class Memory:
    """`microbatch` rows go through the model at once (null: all of a rank's), gradients are added up in `grad_dtype` (null:
    the parameters'), and any of the strategies."""

    microbatch: Count | None = None
    grad_dtype: Literal["float32", "bfloat16"] | None = None
    checkpoint: Checkpoint | None = None
    offload_activations: OffloadActivations | None = None
    states: LowBitStates | None = None
    offload_optimizer: OffloadOptimizer | None = None
    step_in_backward: StepInBackward | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with every chosen strategy, over `model.backbone.blocks`; parameter names stay."""
        if self.grad_dtype:
            model = gradients.accumulate_in(model, self.grad_dtype)
        for strategy in (self.checkpoint, self.offload_activations):
            model = strategy.apply(model) if strategy else model
        return model

    def check(self, **run: Any) -> None:
        """Raise ValueError, in one sentence, where a strategy cannot do with the rest of a run."""
        if self.grad_dtype:
            gradients.check(self.grad_dtype, **run)
        for strategy in (self.states, self.step_in_backward):
            if strategy:
                strategy.check(memory=self, **run)

    def describe(self) -> str:
        """The strategies and their grades of neutrality, for a person."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        told = [f"{name} ({s.grade})" for name, s in chosen.items() if hasattr(s, "grade")]
        told += [f"gradients in {self.grad_dtype}"] if self.grad_dtype else []
        return " + ".join(told) or "baseline"
