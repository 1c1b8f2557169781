"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

All of them are drawn in docs/schedules.md.
"""

import math
from typing import Literal

from trainkit.config import Fraction, Natural, config


@config
class Schedule:
    """A factor on the peak learning rate.

    It rises linearly over `warmup` steps (Goyal et al. 2017, arXiv:1706.02677) and then falls towards `floor`, a
    fraction of the peak:

    - cosine: half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983);
    - linear: a straight line;
    - one_cycle: cosine up from a 25th of the peak, cosine down to `floor` (Smith 2018, arXiv:1803.09820);
    - wsd: flat, then down in a straight line over the last `decay` of the steps (Hu et al. 2024, arXiv:2404.06395);
    - constant: flat;
    - inverse_sqrt: as one over the square root of the step (Vaswani et al. 2017, arXiv:1706.03762).
    """

    kind: Literal["cosine", "linear", "one_cycle", "wsd", "constant", "inverse_sqrt"]
    warmup: Natural = 0
    floor: Fraction = 0.0
    decay: Fraction = 0.2

    def check(self, steps: int) -> None:
        """Refuse a warm-up that leaves no steps after it.

        Raises:
            ValueError: in one sentence.
        """
        if self.warmup >= steps:
            raise ValueError(f"schedule.warmup={self.warmup} leaves nothing of steps={steps}: lower it or raise steps")

    def scale(self, step: int, steps: int) -> float:
        """The factor for the update that follows `step` updates, in a schedule over `steps`."""
        if step < self.warmup:
            return self._rise((step + 1) / (self.warmup + 1))
        progress = min(1.0, (step - self.warmup) / (steps - self.warmup))
        return self.floor + (1 - self.floor) * self._fall(progress, step, steps)

    def _rise(self, progress: float) -> float:
        if self.kind == "one_cycle":
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * progress)) / 2
        return progress

    def _fall(self, progress: float, step: int, steps: int) -> float:
        match self.kind:
            case "cosine" | "one_cycle":
                return (1 + math.cos(math.pi * progress)) / 2
            case "linear":
                return 1 - progress
            case "wsd":
                left = (steps - step) / max(1.0, self.decay * steps)
                return min(1.0, max(0.0, left))
            case "inverse_sqrt":
                return math.sqrt((self.warmup + 1) / (step + 1))
        return 1.0
