"""Is a loss out of the ordinary? A robust z-score: how many (scaled) median absolute deviations it lies above the median
of the losses before it (Leys et al. 2013). All on the device, so that nobody waits for it."""

import torch
from torch import Tensor

FEWEST = 16  # losses that have to be known before one can be out of the ordinary
_NORMAL = 1.4826  # the deviation of a normal distribution, in median absolute deviations


class Spikes:
    """`recent` are the last losses that were not out of the ordinary; NaN where there is none yet."""

    def __init__(self, threshold: float | None, window: int, device: torch.device) -> None:
        self._threshold = threshold
        self.recent = torch.full((window,), torch.nan, device=device)

    def judge(self, loss: Tensor) -> Tensor:
        """Whether `loss` is a spike (a bool scalar)."""
        if self._threshold is None:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        median = self.recent.nanmedian()
        deviation = (self.recent - median).abs().nanmedian() * _NORMAL
        known = torch.isfinite(self.recent).sum() >= FEWEST
        return known & (loss > median + self._threshold * deviation.clamp(min=1e-6))

    def known(self) -> Tensor:
        """The recent losses that there are, oldest first, for a checkpoint."""
        return self.recent[torch.isfinite(self.recent)]

    def load(self, known: Tensor) -> None:
        """Go on from what `known` gave; another window takes the newest of it."""
        fits = known[-len(self.recent) :].to(self.recent)
        self.recent = torch.cat([torch.full_like(self.recent, torch.nan)[len(fits) :], fits])

    def remember(self, loss: Tensor, good: Tensor) -> None:
        """Take `loss` in where it is `good`."""
        if self._threshold is not None:
            moved = torch.cat([self.recent[1:], loss.detach().reshape(1).to(self.recent.dtype)])
            self.recent = torch.where(good, moved, self.recent)
