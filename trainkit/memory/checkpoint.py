"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): run a block again in backward instead of keeping it.

Grade: exact. Dropout draws the same numbers the second time, because the generators' states are put back for it: that the
task seeds a step once, before its first microbatch, is enough. A `budget` is the compiler's own plan of what to keep, and
another plan fuses other kernels: reordered.
"""

import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainkit.config import Count, Fraction, config

_KEPT = (
    *("mm", "addmm", "bmm", "baddbmm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)


@config
class Checkpoint:
    """Every `every`-th block is run again. `selective` keeps what its matrix products and its attention gave, and runs the
    cheap rest again. `budget` leaves the choice to the compiler: it keeps that share of the activations' bytes, those that
    cost most to compute (torch's `activation_memory_budget`)."""

    every: Count = 1
    selective: bool = False
    budget: Fraction | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and (self.every != 1 or self.selective):
            raise ValueError(
                "memory.checkpoint.budget leaves the choice to the compiler: "
                "memory.checkpoint.every and memory.checkpoint.selective must go"
            )

    @property
    def grade(self) -> str:
        """How neutral it is."""
        return "exact" if self.budget is None else "reordered"

    @property
    def said(self) -> str:
        """What it is, for a person."""
        if self.budget is not None:
            return f"checkpoint within {self.budget:g} of the activations"
        name = "selective" if self.selective else "checkpoint"
        return name if self.every == 1 else f"{name} every {self.every} blocks"

    def check(self, *, compile: str, **_: Any) -> None:
        """Raise ValueError where nobody keeps the budget."""
        if self.budget is not None and compile == "off":
            raise ValueError(
                "memory.checkpoint.budget is kept by the compiler: use compile=full or compile=blocks with it"
            )

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` whose blocks keep only what comes into them, or what is chosen."""
        set_budget(1.0 if self.budget is None else self.budget)
        if self.budget is None:
            for block in model.backbone.blocks[:: self.every]:  # type: ignore[index, union-attr]  # a ModuleList
                block.forward = _again_in_backward(block.forward, self.selective)
        return model


def set_budget(budget: float) -> None:
    """Make `budget` that of whatever is compiled from now on. 1 keeps everything, as torch does if nothing is said."""
    if budget == 1.0 and "torch._functorch.config" not in sys.modules:
        return
    import torch._functorch.config as compiler

    if compiler.activation_memory_budget != budget:
        compiler.activation_memory_budget = budget
        torch._dynamo.reset()  # else what was compiled for another budget is used again


def _again_in_backward(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    how: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:  # a frame of ours: the compiler passes over torch's own
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Attention that drops out is run again: leaving out one draw would shift all that come after it."""
    keep = operator in _kept() and not _dropout(operator, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _kept() -> frozenset[Any]:
    return frozenset(getattr(torch.ops.aten, name).default for name in _KEPT)


def _dropout(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The share that an attention operator drops."""
    place = next((i for i, a in enumerate(operator._schema.arguments) if a.name == "dropout_p"), None)
    if place is None:
        return 0.0
    return float(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))
