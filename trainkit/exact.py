"""Sums that come out the same to the bit however they are split, so that what is learned does not depend on how many
ranks learn it.

A number becomes two integers, its multiple of 2**-32 and what is left over as a multiple of 2**-82, and integers add
without rounding (the idea of reproducible summation, Demmel & Nguyen 2015). A sum may reach 2**31, of 8,192 rows at most.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainkit.fingerprint import fingerprint

_COARSE, _FINE = 2.0**32, 2.0**50
MOST_ROWS = 8192


class ExactSums:
    """The gradients of `parameters`, and the loss, summed row by row. `seed_row(i)` seeds what is drawn for this rank's
    i-th row; `over_ranks` sums an int64 tensor over the ranks."""

    def __init__(
        self, parameters: Sequence[Tensor], seed_row: Callable[[int], None], over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        self._parameters, self.begin_row, self._over_ranks = parameters, seed_row, over_ranks
        device = parameters[0].device
        self._sums = [torch.zeros(2, p.numel(), dtype=torch.int64, device=device) for p in parameters]
        self._loss = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._unfit = torch.zeros(
            2, dtype=torch.int64, device=device
        )  # losses, gradients: a scaled one may overflow alone
        self.own = torch.zeros((), dtype=torch.float64, device=device)  # this rank's sums of gradients, as one number

    def take(self, loss: Tensor) -> None:
        """Add one row's loss (a scalar) and the gradients that its backward left, and clear those."""
        self._add(self._loss, loss.reshape(1), self._unfit[0])
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            if parameter.grad is not None:
                self._add(total, parameter.grad.flatten(), self._unfit[1])
                parameter.grad = None

    def finish(self) -> Tensor:
        """Give every parameter the sum over all rows of all ranks as its gradient, and return that of the losses."""
        self.own = fingerprint([*self._sums, self._unfit])
        of_loss, unfit = self._over_ranks(self._unfit) > 0
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = self._value(total, unfit).view_as(parameter).to(parameter.dtype)
            total.zero_()
        loss = self._value(self._loss, of_loss).squeeze().float()
        self._loss.zero_()
        self._unfit.zero_()
        return loss

    def _add(self, total: Tensor, numbers: Tensor, unfit: Tensor) -> None:
        scaled = numbers.double() * _COARSE
        fit = scaled.abs() < 2.0**62
        unfit += (~fit).any()  # NaN is not less than anything
        scaled = torch.where(fit, scaled, 0.0)
        coarse = scaled.round()
        total[0] += coarse.long()
        total[1] += ((scaled - coarse) * _FINE).round().long()

    def _value(self, total: Tensor, unfit: Tensor) -> Tensor:
        coarse, fine = self._over_ranks(total).double()
        return torch.where(unfit, torch.nan, coarse / _COARSE + fine / (_COARSE * _FINE))
