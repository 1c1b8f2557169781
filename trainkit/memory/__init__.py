"""Ways to hold less. None may change what is learned: tests/memory holds each one to its grade.

The field order is the order of application. One file a strategy: `@config`, `apply(model) -> model`.
"""

from typing import Literal

from torch import nn

from trainkit.config import Count, config
from trainkit.memory import fused_loss
from trainkit.memory.checkpoint import Checkpoint, set_budget
from trainkit.memory.fused_loss import FusedLoss
from trainkit.memory.offload_activations import OffloadActivations
from trainkit.memory.stream import Stream


@config
class Memory:
    """`microbatch` rows go through the model at once (null: all of a rank's; auto: as many as fit, found by trial), and any
    of the strategies."""

    microbatch: Count | Literal["auto"] | None = None
    checkpoint: Checkpoint | None = None
    offload_activations: OffloadActivations | None = None
    stream: Stream | None = None
    fused_loss: FusedLoss = "auto"

    def check(self, *, compile: str, parallel: str, deterministic: str, compute: str | None) -> None:
        """Raise ValueError when a strategy cannot go with how else a run is done."""
        if self.checkpoint and self.checkpoint.budget is not None and compile == "off":
            raise ValueError(
                "memory.checkpoint.budget is kept by the compiler: use compile=full or compile=blocks with it"
            )
        if self.stream and parallel == "ddp":
            raise ValueError("memory=stream holds slices of the model and parallel=ddp all of it: use parallel=fsdp")
        if self.stream and deterministic == "elastic":
            raise ValueError("deterministic=elastic sums whole gradients itself: memory=stream has slices of them")
        if self.stream and compute == "float16":
            raise ValueError("memory=stream steps on the host, where float16's scaler has no part: use precision=bf16")

    def apply(self, model: nn.Module, *, compiled: bool = False) -> nn.Module:
        """`model` with every chosen strategy, over `model.backbone.blocks`; parameter names stay."""
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
        chosen = {"checkpoint": self.checkpoint, "offload_activations": self.offload_activations, "stream": self.stream}
        said = [f"{name} ({s.grade})" for name, s in chosen.items() if s]
        said += {
            "auto": ["fused_loss where logits are large (reordered)"],
            "on": ["fused_loss (reordered)"],
            "off": [],
        }[self.fused_loss]
        return " + ".join(said) or "baseline"

    def advice(self) -> str:
        """What a person can do whose step does not fit, cheapest first."""
        ways = [way for way in ("checkpoint", "offload_activations", "stream") if getattr(self, way) is None]
        ways += ["fused_loss"] if self.fused_loss == "off" else []
        return f"memory={'+'.join(ways)} hold less, any of them" if ways else "choose a smaller model or data.length"


def stats(model: nn.Module) -> dict[str, float]:
    """What the strategies of `model` moved since the last call, and how long that was waited for."""
    return {name: value for told in getattr(model, "memory_stats", []) for name, value in told().items()}
