"""Keep what blocks save for backward in host memory (torch.autograd.graph.save_on_cpu).

Grade: exact. On a CPU it only copies: it is there so that its neutrality is tested everywhere.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from trainkit.config import config


@config
class OffloadActivations:
    """Copies to pinned memory where there is a GPU."""

    grade: ClassVar[str] = "exact"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` whose blocks' activations lie in host memory between forward and backward."""
        for block in model.backbone.blocks:  # type: ignore[union-attr]  # a ModuleList
            block.forward = _offloaded(block.forward)
        return model


def _offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*args, **kwargs)

    return run
