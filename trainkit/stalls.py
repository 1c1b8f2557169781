"""How long a device stood still: on a GPU between events of its stream, on a CPU by the clock."""

import time
from collections import deque
from typing import Any

import torch

MOST = 1 << 16  # waits that are remembered until somebody asks for them


class Stalls:
    """Waits of one device, each from one moment to another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: deque[tuple[Any, Any]] = deque(maxlen=MOST)

    def now(self) -> Any:
        """This moment of what is being computed."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, begin: Any) -> None:
        """It stood still since then."""
        self._waits.append((begin, self.now()))

    def seconds(self) -> float:
        """All of it since the last call."""
        waits, self._waits = self._waits, deque(maxlen=MOST)
        if self._device.type != "cuda":
            return float(sum(end - begin for begin, end in waits))
        if waits:
            waits[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in waits)) / 1000
