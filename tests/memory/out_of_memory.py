"""Runs whose memory runs out when somebody says so."""

from typing import Any

import pytest
import torch

from trainkit.models.decoder import Backbone

PLAIN = ["optimizer=sgd", "optimizer.lr=0.1", "clip=0", "precision=fp64", "data.batch=8", "evaluation.sample_tokens=0"]
forward = Backbone.forward
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def too_many(patch: pytest.MonkeyPatch, rows: int, error: Exception = GPU, *, where: str = "forward") -> list[int]:
    """More than `rows` rows at once are too many, in the last block's forward or in its backward. What was tried."""
    tried: list[int] = []

    def run_out(grad: torch.Tensor) -> None:
        raise error

    def limited(self: Backbone, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = forward(self, tokens, *args, **kwargs)
        if self.training:
            tried.append(len(tokens))
            if len(tokens) > rows and where == "forward":
                raise error
            if len(tokens) > rows:
                hidden.register_hook(run_out)
        return hidden

    patch.setattr(Backbone, "forward", limited)
    return tried
