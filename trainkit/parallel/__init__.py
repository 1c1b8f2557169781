"""Which processes train together, and the few questions that a task or a loop may ask of them."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from trainkit.config import config
from trainkit.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees it. `device` is where its tensors live."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank prints, and touches the run's folder."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks."""
        return tensor


@config
class Parallel:
    """One process on one device. `device`: auto (CUDA where there is one), cpu, cuda or cuda:N."""

    kind: Literal["single"] = "single"
    device: str = "auto"

    def join(self, device: torch.device) -> Ranks:
        """Meet the other ranks.

        Raises:
            UserError: torchrun started more processes than this strategy has work for.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise UserError(
                f"parallel=single trains in one process, but torchrun started {started}: use --nproc_per_node=1"
            )
        return Ranks(device=device)
