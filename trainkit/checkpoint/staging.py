"""A copy of what is to be saved, so that training goes on while it is written."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainkit.checkpoint.layout import Box
from trainkit.checkpoint.writing import Draft


class Staging:
    """Host memory for one checkpoint, kept from save to save: page-locked where the tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Box, Tensor] = {}

    def copy(self, it: Draft) -> Draft:
        """`it` with tensors of its own. Returns when they are copied; what was copied before is overwritten."""
        self.make_room(it.held)
        for box, tensor in it.held.items():
            self._buffers[box].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in it.held.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return replace(it, held={box: self._buffers[box] for box in it.held})

    def make_room(self, held: Mapping[Box, Tensor]) -> None:
        """Have memory for these, and touch it, which takes longer than the copy does."""
        for box, tensor in held.items():
            there = self._buffers.get(box)
            if there is None or there.dtype != tensor.dtype:
                self._buffers[box] = torch.zeros(box.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        for box in self._buffers.keys() - held.keys():
            del self._buffers[box]


def room_for(size: int) -> bool:
    """Whether this machine has `size` bytes of memory to spare, with a fifth left over. True where it does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return True
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return size < 0.8 * min(available, _group_limit())


def _group_limit() -> int:
    """What a container leaves of the memory (cgroup v2, or v1)."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        at = Path("/sys/fs/cgroup")
        if (at / limit).exists():
            text = (at / limit).read_text().strip()
            return int(text) - int((at / used).read_text()) if text.isdigit() else 1 << 62
    return 1 << 62
