"""Optimizers against their papers in float64, state that resumes, updates that are not made."""

from typing import Any

import pytest
import torch
from torch import nn

from trainkit import optimizers
from trainkit.errors import UserError
from trainkit.optimizers import SGD, AdamW, Muon
from trainkit.optimizers.muon import WholeMuon
from trainkit.optimizers.state import load_named_state, named_state

ALL = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "sgd": SGD(lr=0.01, momentum=0.9, weight_decay=0.1),
    "muon": Muon(lr=0.01, adamw_lr=0.003),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.double()


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0, skip: float = 0.0) -> None:
    for step in range(begin, begin + steps):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        optimizers.step(optimizer, torch.tensor(skip))


def gradients(shape: torch.Size, index: int, steps: int) -> list[torch.Tensor]:
    found = []
    shapes = [p.shape for p in Small().parameters()]
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        found.append([torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes][index])
    return found


def test_adamw_is_that_of_the_paper() -> None:
    model = Small()
    start = [p.detach().clone() for p in model.parameters()]
    take(model, AdamW(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).build(model), 5)
    for i, (parameter, theta) in enumerate(zip(model.parameters(), start, strict=True)):
        m = v = torch.zeros_like(theta)
        decay = 0.1 if theta.ndim >= 2 else 0.0
        for t, g in enumerate(gradients(theta.shape, i, 5), 1):
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            theta = theta - 0.01 * (step + decay * theta)
        torch.testing.assert_close(parameter.detach(), theta, rtol=1e-10, atol=1e-12)


def test_sgd_is_momentum() -> None:
    model = Small()
    start = [p.detach().clone() for p in model.parameters()]
    take(model, ALL["sgd"].build(model), 4)
    for i, (parameter, theta) in enumerate(zip(model.parameters(), start, strict=True)):
        velocity = torch.zeros_like(theta)
        for t, g in enumerate(gradients(theta.shape, i, 4)):
            g = g + (0.1 * theta if theta.ndim >= 2 else 0)
            velocity = g if t == 0 else 0.9 * velocity + g
            theta = theta - 0.01 * velocity
        torch.testing.assert_close(parameter.detach(), theta, rtol=1e-12, atol=1e-14)


def test_muon_makes_the_blocks_updates_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    model, other = Small(), Small()
    start = model.blocks[0].weight.detach().clone()  # type: ignore[union-attr]
    take(model, Muon(lr=0.01, adamw_lr=0.003, weight_decay=0.0, nesterov=False).build(model), 1)
    take(other, AdamW(lr=0.003, weight_decay=0.0).build(other), 1)
    update = (start - model.blocks[0].weight.detach()) / (0.01 * 0.2 * 8**0.5)  # type: ignore[union-attr]
    left, _, right = torch.linalg.svd(gradients(start.shape, 1, 1)[0])
    found = left.T @ update.double() @ right.T  # diagonal, with singular values near 1, if it is orthogonalisation
    assert float((found - found.diag().diag()).abs().max()) < 0.05
    assert 0.6 < float(found.diag().min()) <= float(found.diag().max()) < 1.3
    for name in ("embed.weight", "blocks.0.bias", "norm.weight"):
        torch.testing.assert_close(model.get_parameter(name), other.get_parameter(name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (16, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_to_the_bit(shape: tuple[int, int], nesterov: bool) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    how: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    of_torch = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **how)
    optimizer = WholeMuon([ours], **how)
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        of_torch.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_state_resumes_bitwise(name: str) -> None:
    whole = Small()
    optimizer = ALL[name].build(whole)
    take(whole, optimizer, 3)
    named = {k: v.clone() for k, v in named_state(whole, optimizer).items()}
    copy = Small()
    copy.load_state_dict(whole.state_dict())
    take(whole, optimizer, 3, begin=3)
    fresh = ALL[name].build(copy)
    load_named_state(copy, fresh, named)
    take(copy, fresh, 3, begin=3)
    for mine, theirs in zip(copy.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    ours = named_state(copy, fresh)
    assert all(torch.equal(v, ours[k]) for k, v in named_state(whole, optimizer).items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("before", [0, 2])
def test_an_update_that_must_not_be_made_changes_nothing(name: str, before: int) -> None:
    model = Small()
    optimizer = ALL[name].build(model)
    take(model, optimizer, before)
    weights = [p.detach().clone() for p in model.parameters()]
    take(model, optimizer, 3, begin=90, skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    take(model, optimizer, 2, begin=before)
    alone = Small()
    take(alone, ALL[name].build(alone), before + 2)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True))


def changed(named: dict[str, torch.Tensor], **other: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in (named | other).items() if v is not None}


def test_another_models_state_is_refused() -> None:
    model = Small()
    optimizer = ALL["adamw"].build(model)
    take(model, optimizer, 1)
    named = named_state(model, optimizer)
    fresh = ALL["adamw"].build(model)
    with pytest.raises(UserError, match=r"has state for other.weight.exp_avg, which this model lacks"):
        load_named_state(model, fresh, changed(named, **{"other.weight.exp_avg": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"embed.weight.exp_avg is \(3,\) there"):
        load_named_state(model, fresh, changed(named, **{"embed.weight.exp_avg": torch.zeros(3)}))
    missing = {k: v for k, v in named.items() if not k.startswith("norm.weight.")}
    with pytest.raises(UserError, match=r"has no state for norm.weight"):
        load_named_state(model, fresh, missing)


def test_peaks_are_the_configs() -> None:
    assert {g["lr"] for g in ALL["muon"].build(Small()).param_groups} == {0.01, 0.003}
    with pytest.raises(ValueError, match="nesterov needs"):
        SGD(lr=0.1, momentum=0.0, nesterov=True)
