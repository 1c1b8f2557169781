"""Sums that do not depend on order, against Python's own integers and fractions."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from trainkit.exact import ExactSums


def summed(rows: list[Tensor], losses: list[float]) -> tuple[Tensor, Tensor]:
    weight = torch.zeros_like(rows[0])
    sums = ExactSums([weight], lambda row: None, lambda t: t)
    for row, loss in zip(rows, losses, strict=True):
        weight.grad = row.clone()
        sums.take(torch.tensor(loss))
    total = sums.finish()
    assert weight.grad is not None
    return weight.grad, total


def test_the_sum_is_the_true_one_in_any_order() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-18, 4, 300)
    rows = [torch.randn(300) * scale for _ in range(16)]
    losses = [float(x) for x in torch.rand(16)]
    found, loss = summed(rows, losses)
    backwards, same = summed(rows[::-1], losses[::-1])
    assert torch.equal(found, backwards)
    assert torch.equal(loss, same)
    true = torch.tensor([float(sum(Fraction(float(row[i])) for row in rows)) for i in range(300)])
    torch.testing.assert_close(found, true, rtol=1e-7, atol=16 * 2.0**-83)
    assert math.isclose(float(loss), math.fsum(float(torch.tensor(x)) for x in losses), rel_tol=1e-7)


def test_what_is_not_finite_is_not_hidden() -> None:
    for bad in (math.nan, math.inf, 1e30):
        row = torch.ones(3)
        row[1] = bad
        found, loss = summed([torch.ones(3), row], [1.0, 1.0])
        assert not torch.isfinite(found).any()
        assert loss == 2  # under a float16 scaler a gradient may overflow alone
        found, loss = summed([torch.ones(3), torch.ones(3)], [1.0, bad])
        assert torch.equal(found, torch.full((3,), 2.0))
        assert not torch.isfinite(loss)
    found, _ = summed([torch.ones(3)], [1.0])  # and the next step is clean
    assert torch.equal(found, torch.ones(3))
