"""How fast a run trains: tokens per second, the share of the device's peak, the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Rates between one reading and the next, of the time spent training: what `pause` covers does not count.

    `flops_per_token` counts forward and backward, causal attention once; `peak_flops` is what a matrix multiplication
    reaches on this device, measured, so that `mfu` is a share of what is possible here and not of a data sheet.
    """

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float
    seconds: float = 0.0  # of training since the run began, over all its restarts
    _step: int = field(default=0, init=False)
    _mark: float = field(default=0.0, init=False)
    _paused: float = field(default=0.0, init=False)

    def start(self, step: int) -> None:
        """Begin to count at `step`."""
        self._step, self._mark, self._paused = step, time.perf_counter(), 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (evaluating, saving) is not training."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def read(self, step: int, stop_at: int) -> dict[str, float]:
        """The rates of the steps since the last reading: call it when the device has finished them."""
        seconds = max(time.perf_counter() - self._mark - self._paused, 1e-9)
        steps = step - self._step
        self.seconds += seconds
        self.start(step)
        tokens_per_s = steps * self.tokens_per_step / seconds
        return {
            "tokens": step * self.tokens_per_step,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / self.peak_flops,
            "time": self.seconds,
            "eta_s": (stop_at - step) * seconds / steps,
        }
