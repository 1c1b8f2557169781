"""Which rank is slow? All of them finish a step together, so it is each one's own part of it that tells: from the start of
the step until its last forward is done, without what it waits for the others' counts. Under FSDP a forward waits for the
others' slices too, so that a slow rank shows less."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

SLOW = 1.5  # times the median of all ranks


class Pace:
    """Seconds a step of this rank's own work. On a GPU the device's clock counts, and nobody waits for it until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._done: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._waits: list[tuple[Any, Any]] = []
        self._steps = 0

    def begin(self) -> None:
        """A step begins."""
        self.keep()
        self._begun = self._now()

    def forward_done(self) -> None:
        """A forward of it is done; the last one counts."""
        self._done = self._now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for others."""
        begin = self._now()
        yield
        if self._begun is not None and self._done is None:
            self._waits.append((begin, self._now()))

    def keep(self) -> None:
        """The step is over."""
        if self._begun is not None and self._done is not None:
            self._spans.append((self._begun, self._done))
            self._steps += 1
        self._begun = self._done = None

    def read(self) -> float:
        """Seconds a step since the last reading; 0 where there was none."""
        self.keep()
        seconds = self._seconds(self._spans) - self._seconds(self._waits)
        steps, self._steps, self._spans, self._waits = self._steps, 0, [], []
        return seconds / max(steps, 1)

    def _seconds(self, spans: list[tuple[Any, Any]]) -> float:
        return float(sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def straggler(seconds: Sequence[float]) -> tuple[int, float] | None:
    """The slowest rank and how many times the median it takes, where that is far more than its share."""
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    ratio = seconds[slowest] / max(median, 1e-9)
    return (slowest, ratio) if ratio > SLOW and seconds[slowest] - median > 1e-3 else None
