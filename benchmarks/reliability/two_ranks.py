"""DCP with two ranks that share the writing of a replicated state, as under DDP. The fault is in the second rank."""

import datetime
import os
import tempfile
from pathlib import Path

import torch.distributed as dist

from benchmarks.reliability.by_hand import DcpInPlace
from benchmarks.reliability.server import Watch


class Unwatched:
    """Of the rank without the fault nothing is told."""

    def saving(self, step: int, state: object) -> None: ...

    def saved(self, step: int) -> None: ...


class DcpTwoRanks(DcpInPlace):
    def train(self, folder: Path, watch: Watch) -> None:
        meeting = tempfile.mkdtemp()
        other = os.fork() == 0
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}/store",
            rank=0 if other else 1,
            world_size=2,
            timeout=datetime.timedelta(seconds=30),
        )
        if other:
            try:
                super().train(folder, Unwatched())
            finally:  # an error of this rank is the other's fault, and the first process is the one that tells
                os._exit(0)
        super().train(folder, watch)
