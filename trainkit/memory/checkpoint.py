"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): run a block again in backward instead of keeping it.

Grade: exact. Dropout draws the same numbers the second time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.config import Count, config


@config
class Checkpoint:
    """Every `every`-th block is run again."""

    grade: ClassVar[str] = "exact"
    every: Count = 1

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` whose blocks keep only what comes into them."""
        for block in model.backbone.blocks[:: self.every]:  # type: ignore[index, union-attr]  # a ModuleList
            block.forward = _again_in_backward(block.forward)
        return model


def _again_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)
