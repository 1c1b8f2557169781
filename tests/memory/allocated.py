"""Bytes that tensors take, by torch's profiler."""

from collections.abc import Callable

import torch

from trainkit.profile.allocations import Allocations


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that tensors made in `work` take at once."""
    with Allocations(torch.nn.Module(), device=torch.device("cpu")) as seen:
        work()
    return seen.peak
