"""Which processes train together. torchrun starts them; torch.distributed carries what they say."""

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from trainkit.config import config
from trainkit.errors import UserError
from trainkit.parallel.group import ElsewhereError, Group, LostRankError
from trainkit.parallel.pace import straggler
from trainkit.parallel.ranks import Ranks

TIMEOUT = timedelta(minutes=10)  # a rank that says nothing for so long is taken for dead

__all__ = ["ElsewhereError", "Group", "LostRankError", "Parallel", "Ranks", "straggler"]


@config
class Parallel:
    """`single`: one process. `ddp`: a replica of the model on every rank. `fsdp`: every rank a slice of it.

    `device`: auto (CUDA where there is one), cpu, cuda or cuda:N.
    """

    kind: Literal["single", "ddp", "fsdp"] = "single"
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError when torchrun started more processes than this strategy has work for."""
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.kind == "single" and started > 1:
            raise UserError(
                f"parallel=single trains in one process, but torchrun started {started}: "
                f"use parallel=ddp or parallel=fsdp, or --nproc_per_node=1"
            )

    def join(self, device: torch.device, *, stream: bool = False) -> Ranks:
        """Meet the other ranks that torchrun started; without torchrun there are none. To `stream` parameters from the
        host is FSDP's work, on one rank too."""
        self.check()
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        kind = "fsdp" if stream else self.kind
        if kind == "single" or (kind == "ddp" and size == 1):
            return Ranks(device=device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        backend = "cpu:gloo,cuda:nccl" if stream and device.type == "cuda" else backend  # norms are summed on the host
        dist.init_process_group(backend, store=_meeting(), rank=rank, world_size=size, timeout=TIMEOUT)
        host, saving = (
            Group(rank, size, dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None) for _ in range(2)
        )
        return Ranks(device=device, rank=rank, size=size, host=host, saving=saving, kind=kind, stream=stream)


def _meeting() -> dist.Store:
    """Where ranks leave their addresses. torchrun keeps it over restarts, so every attempt has a place of its own in it:
    else ranks call addresses of the dead."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
