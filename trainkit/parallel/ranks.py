"""The processes of a run as one of them sees it, and the few questions that a task or a loop may ask of the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.errors import RanOutError
from trainkit.fingerprint import fingerprint
from trainkit.parallel.group import Group
from trainkit.parallel.pace import Pace, straggler
from trainkit.parallel.replicate import Replicas


@dataclass
class Ranks:
    """`device` is where this rank computes. `host` is for words between the ranks in the loop, `saving` for those of a
    save that goes on behind it. With `stream` the parameters' home is the host."""

    device: torch.device
    rank: int = 0
    size: int = 1
    host: Group = field(default_factory=Group)
    saving: Group = field(default_factory=Group)
    kind: str = "single"
    stream: bool = False
    pace: Pace = field(init=False)
    replicas: Replicas | None = None
    slow: int | None = None  # the rank of which was said that it is slow
    careful: bool = False  # sums begin when every rank has said that its memory was enough

    def __post_init__(self) -> None:
        self.pace = Pace(self.device)

    @property
    def home(self) -> torch.device:
        """Where parameters, gradients and the optimizer's state live."""
        return torch.device("cpu") if self.stream else self.device

    @property
    def first(self) -> bool:
        """Whether this rank prints, and touches the run's folder."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        if self.size > 1:
            tensor = tensor.clone()
            with self.pace.waiting():
                dist.all_reduce(tensor)
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may lie in slices on the ranks, in one piece."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor

    def own(self, gradients: Sequence[Tensor], norm: Tensor) -> Tensor:
        """What this rank alone answers for of the gradients, as one number: its replica's before they were summed, or its
        slices of them; alone it is their `norm`."""
        if self.replicas is not None:
            return self.replicas.own()
        return fingerprint(gradients) if self.kind == "fsdp" else norm

    def apply(self, model: nn.Module, *, exact_sums: bool = False) -> nn.Module:
        """`model` spread over the ranks. With `exact_sums` the gradients are summed by somebody else."""
        if self.kind == "fsdp":
            from trainkit.parallel import fsdp  # takes a second, which only those who shard should wait for

            return fsdp.shard(model, self.device, self.size, stream=self.stream)
        if self.size > 1 and not exact_sums:
            self.replicas = Replicas(model)
        return model

    def sum_next(self, model: Any, last: bool) -> None:
        """Say before a backward whether it is the step's last one, in which gradients are summed over the ranks."""
        if self.kind == "fsdp":
            model.set_requires_gradient_sync(last or self.stream)  # else whole gradients would wait on the device
        elif self.replicas is not None:
            self.replicas.sum_next(last and not self.careful)

    def finish_sums(self) -> None:
        """Wait for the sums of gradients, after the step's last backward.

        Raises:
            RanOutError: a careful step, and another rank ran out of memory in it.
        """
        if self.careful and not self.all_fit(True):
            raise RanOutError("another rank ran out of memory")
        if self.replicas is not None:
            if self.careful:
                self.replicas.sum_next(True)
            self.replicas.finish()

    def straggler(self) -> str | None:
        """Which rank keeps the others waiting, in words, when it is another one than when this was asked last."""
        if self.size == 1:
            return None
        found, before = straggler(self.host.gather(self.pace.read())), self.slow
        self.slow = found[0] if found else None
        if not found or found[0] == before:
            return None
        return f"rank {found[0]} takes {found[1]:.1f} times as long as the others for its part"

    def all_fit(self, fits: bool) -> bool:
        """Whether every rank's memory was enough for what they all tried."""
        return self.host.max(int(not fits)) == 0

    def leave(self) -> None:
        """Part from the other ranks, when all are done."""
        if dist.is_initialized():
            if self.size > 1:
                dist.barrier(group=self.host.process_group)  # gloo may abort a rank whose peers are still busy
            dist.destroy_process_group()
