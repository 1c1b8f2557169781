"""Data parallelism: every rank holds the whole model, and gradients are summed over the ranks (Li et al. 2020,
arXiv:2006.15704).

Grade: reordered. torch's own DDP lays its buckets out anew after the first step, so that with three ranks or more a run
that goes on adds in another order than one that was never stopped. Here a bucket is a fixed slice of the parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.fingerprint import fingerprint

BUCKET_BYTES = 25 << 20


class Replicas:
    """Sums the gradients of a model's parameters over the ranks, a bucket as soon as all of it is there, while backward
    goes on with the rest. The ranks are those of `group` (None: all)."""

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self._group = group
        # backward comes from the last layers to the first
        parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        self._buckets = _buckets(parameters)
        self._missing: list[int] = []
        self._works: list[tuple[list[Tensor], Tensor, Any]] = []
        self._own: list[Tensor] = []
        self._summing = False
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))

    def sum_next(self, last: bool) -> None:
        """Say before a backward whether it is the last one of the step: then sums are made."""
        self._summing = last
        self._missing = [len(bucket) for bucket in self._buckets]
        self._own = []

    def finish(self) -> None:
        """Wait for the sums, after the last backward: from here on a gradient is a part of its bucket. A parameter that got
        none on this rank counts as zero."""
        for number, missing in enumerate(self._missing):
            if missing:
                self._send(number)
        for parameters, flat, work in self._works:
            work.wait()
            for parameter, whole in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = whole.view_as(parameter)
        self._works, self._missing = [], []

    def own(self) -> Tensor:
        """This rank's gradients of the last step, before they were summed, as one number (float64)."""
        return fingerprint([torch.stack(self._own)])

    def _arrived(self, number: int) -> None:
        if self._summing:
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._send(number)

    def _send(self, number: int) -> None:
        parameters = self._buckets[number]
        flat = torch.cat([_gradient(p).flatten() for p in parameters])
        self._own.append(fingerprint([flat]))
        self._works.append((parameters, flat, dist.all_reduce(flat, group=self._group, async_op=True)))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        if buckets[-1] and (size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != buckets[-1][-1].dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
