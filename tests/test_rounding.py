"""Updates of bfloat16 parameters: none is lost on average, and what is drawn depends on nothing but where it is drawn."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.conftest import SMALL, weights
from tests.ranks import in_ranks
from trainkit import build, optimizers
from trainkit import run as runs
from trainkit.learner import Learner
from trainkit.optimizers import SGD, AdamW, Muon, rounding
from trainkit.optimizers.rounding import mix, random_bits, rounded, write

CPU = torch.device("cpu")


def written(wide: Tensor, key: int | None) -> Tensor:
    parameter = torch.zeros_like(wide, dtype=torch.bfloat16)
    write(parameter, wide, key)
    return parameter


@pytest.mark.parametrize("value", [1 + 2**-9, -1 - 1.3 * 2**-9, 0.02, -3.1e-5, 1e-39, 255.4])
def test_the_mean_of_what_is_written_is_what_was_given(value: float) -> None:
    many = 1 << 17
    found = written(torch.full((many,), value), key=7).double()
    given = float(torch.tensor(value))
    steps = found.unique()
    assert len(steps) == 2
    assert steps[0] < given < steps[1]
    of_mean = float(found.std()) / math.sqrt(many)
    assert abs(float(found.mean()) - given) < 5 * of_mean


def test_each_place_has_the_right_mean_over_steps() -> None:
    wide = 1 + torch.linspace(0, 2**-7, 65)[:-1]
    total = torch.zeros(64, dtype=torch.float64)
    steps = 2000
    for step in range(steps):
        total += written(wide, mix(step, "w")).double()
    of_mean = 2**-7 * 0.5 / math.sqrt(steps)
    assert ((total / steps - wide).abs() < 5 * of_mean).all()


def test_bits_are_uniform_and_unrelated() -> None:
    many = 1 << 17
    one = random_bits(0, many, mix(1, "w"), CPU).double()
    for of_16 in (one // 4096, one % 16):  # the high and the low bits
        counts = torch.bincount(of_16.long(), minlength=16).double()
        assert ((counts - many / 16) ** 2 / (many / 16)).sum() < 45  # chi-square of 15 degrees, 1 in 10,000
    others = {
        "the next step": random_bits(0, many, mix(2, "w"), CPU),
        "another parameter": random_bits(0, many, mix(1, "v"), CPU),
        "the next place": random_bits(1, many, mix(1, "w"), CPU),
        "the next row": random_bits(64, many, mix(1, "w"), CPU),
    }
    for what, other in others.items():
        correlation = torch.corrcoef(torch.stack([one, other.double()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(many), what


def test_what_bfloat16_can_hold_is_written_as_it_is() -> None:
    exact = torch.randn(4096).bfloat16().float()
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs whose bits are all set
    wide = torch.cat([exact, odd, full])
    torch.testing.assert_close(written(wide, key=3).float(), wide, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(written(torch.tensor([1 + 2**-10]), None).float(), torch.ones(1))


def test_how_much_is_drawn_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(50, 21)
    whole = written(wide, key=11)
    monkeypatch.setattr(rounding, "CHUNK", 17)
    assert torch.equal(written(wide, key=11), whole)
    assert not torch.equal(written(wide, key=12), whole)


class Two(nn.Module):
    """A matrix and a vector in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(9, 5, bias=True)])
        self.gain = nn.Parameter(torch.ones(7))
        self.bfloat16()

    def give_gradients(self, step: int) -> None:
        torch.manual_seed(step)
        for p in self.parameters():
            p.grad = torch.randn_like(p)


def update(optimizer: torch.optim.Optimizer, step: int, skip: float = 0.0) -> None:
    optimizers.begin(optimizer, step)
    optimizers.step(optimizer, torch.tensor(skip))


@pytest.mark.parametrize("bucket", [1, 1 << 20])
@pytest.mark.parametrize("how", ["stochastic", "nearest", "master"])
def test_an_update_is_that_of_float32_copies(
    how: rounding.Rounding, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "BUCKET", bucket)
    ours, reference = Two(), Two().float()
    optimizer = rounded(AdamW(lr=0.01).build(ours), ours, how)
    other = AdamW(lr=0.01).build(reference)
    for step in range(4):
        ours.give_gradients(step)
        for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
            if how != "master":
                q.data.copy_(p)
        update(optimizer, step)
        other.step()
        for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
            assert torch.equal(p, written(q.detach(), mix(step, name) if how == "stochastic" else None))
    assert {t.dtype for p in ours.parameters() for t in optimizer.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("cfg", [AdamW(lr=0.01), SGD(lr=0.1), Muon(lr=0.01, adamw_lr=0.01)], ids=lambda c: c.kind)
def test_a_skipped_update_changes_nothing(cfg: AdamW | SGD | Muon) -> None:
    model = Two()
    optimizer = rounded(cfg.build(model), model, "stochastic")

    def everything() -> list[Tensor]:
        state = [t.clone() for p in model.parameters() for t in optimizer.state[p].values()]
        return [*(p.detach().clone() for p in model.parameters()), *state]

    model.give_gradients(0)
    update(optimizer, 0)
    before = everything()
    update(optimizer, 1, skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    update(optimizer, 1)
    assert not torch.equal(everything()[0], before[0])
    assert {part.key for part in getattr(optimizer, "parts", [optimizer])} == {1}


def test_small_updates_are_lost_to_nearest_only() -> None:
    found = {}
    for how in ("nearest", "stochastic", "master"):
        model = nn.ParameterList([torch.ones(20_000, dtype=torch.bfloat16)])
        optimizer = rounded(SGD(lr=1e-4, momentum=0.0).build(model), model, how)  # type: ignore[arg-type]
        for step in range(40):
            model[0].grad = torch.ones_like(model[0])
            update(optimizer, step)
        found[how] = float(model[0].detach().double().mean())
    assert found["nearest"] == 1
    assert found["stochastic"] == pytest.approx(1 - 40e-4, abs=2e-4)
    assert found["master"] == float(torch.tensor(1 - 40e-4).bfloat16())


def test_a_tiny_learning_rate_moves_a_model(learner: Callable[..., Learner]) -> None:
    def moved(*how: str) -> float:
        it = learner("precision=bf16_pure", "optimizer.lr=1e-6", "optimizer.weight_decay=0", "schedule=constant", *how)
        start = weights(it).clone()
        for _ in range(4):
            it.train_step()
        return float((weights(it) != start).float().mean())

    assert moved() > 3 * moved("precision.rounding=nearest")


def test_the_norm_of_bfloat16_gradients_is_not_in_bfloat16() -> None:
    parameters = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((64, 3), (5,))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    exact = torch.cat([p.grad.double().flatten() for p in parameters]).norm()
    norm = optimizers.total_norm(torch.optim.SGD(parameters), parameters)
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)


WAYS = {
    "bf16_pure": ["precision=bf16_pure", "optimizer=adamw"],
    "muon": ["precision=bf16_pure", "optimizer=muon"],
    "bf16_master": ["precision=bf16_master", "optimizer=adamw"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(trained: Callable[..., build.Trainer], way: str) -> None:
    whole = trained(*WAYS[way], name="whole").learner
    trained(*WAYS[way], "stop_at=3", name="parts")
    parts = trained(*WAYS[way], name="parts").learner
    ours, theirs = parts.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k.startswith(("model.", "optimizer.")))
    assert weights(parts).dtype == torch.bfloat16


def draws_on_two_ranks(elastic: Tensor, losses: list[float]) -> None:
    ranks = build.ranks(runs.composed(["parallel=fsdp", "parallel.device=cpu"]))

    def made(*how: str) -> Learner:
        run = runs.composed([*SMALL, *how, "precision=bf16_pure", "name=t"])
        return build.learner(run, run.data.open(), replace(ranks, kind=run.parallel.kind))

    replicated = made("parallel=ddp", "deterministic=elastic")
    for _ in range(3):
        replicated.train_step()
    assert torch.equal(weights(replicated), elastic)
    sliced = made("parallel=fsdp")
    found = [float(sliced.train_step()["loss"]) for _ in range(4)]
    assert found == pytest.approx(losses, rel=2e-3)  # gradients are summed in bfloat16, in another order
    torch.manual_seed(5)
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((5, 7), (3,)):
        wide = torch.randn(shape)
        part = distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), mesh, [Shard(0)])
        write(part, distribute_tensor(wide, mesh, [Shard(0)]), key=9)
        assert torch.equal(part.full_tensor(), written(wide, 9))
    ranks.leave()


def test_two_ranks_draw_what_one_draws(learner: Callable[..., Learner]) -> None:
    one, plain = learner("precision=bf16_pure", "deterministic=elastic"), learner("precision=bf16_pure")
    for _ in range(3):
        one.train_step()
    losses = [float(plain.train_step()["loss"]) for _ in range(4)]
    in_ranks(2, draws_on_two_ranks, weights(one), losses)
