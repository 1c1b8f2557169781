"""Ways to hold less. None may change what is learned: tests/test_memory.py holds each one to its grade.

The field order is the order of application. One file a strategy: `@config`, `apply(model) -> model`.
"""

from torch import nn

from trainkit.config import Count, config
from trainkit.memory.checkpoint import Checkpoint
from trainkit.memory.offload_activations import OffloadActivations


@config
class Memory:
    """`microbatch` rows go through the model at once (null: all of a rank's), and any of the strategies."""

    microbatch: Count | None = None
    checkpoint: Checkpoint | None = None
    offload_activations: OffloadActivations | None = None

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with every chosen strategy, over `model.backbone.blocks`; parameter names stay."""
        for strategy in (self.checkpoint, self.offload_activations):
            model = strategy.apply(model) if strategy else model
        return model

    def describe(self) -> str:
        """The strategies and their grades of neutrality, for a person."""
        chosen = {"checkpoint": self.checkpoint, "offload_activations": self.offload_activations}
        return " + ".join(f"{name} ({s.grade})" for name, s in chosen.items() if s) or "baseline"
