"""Which precisions go with what; float8."""

import itertools
import sys
from collections.abc import Callable
from math import isfinite

import pytest
import torch
from torch import Tensor

from tests.conftest import SMALL, weights
from trainkit import build
from trainkit import run as runs
from trainkit.choices import choices
from trainkit.errors import UserError
from trainkit.learner import Learner
from trainkit.precision import Float8, Precision

EMULATED = ["precision=fp8", "precision.float8.emulate=true"]
OPTIMIZERS = ("adamw", "sgd", "muon")
SUMS_AND_ADAPTERS = (("layout", "null"), ("elastic", "null"), ("layout", "qlora"), ("elastic", "lora"))


def why_not(precision: str, optimizer: str, adapter: str) -> str | None:
    """What a person is told of a combination that does not work."""
    if adapter == "null":
        return None
    return "float8 trains a model's own" if precision == "fp8" else "muon is for whole" if optimizer == "muon" else None


@pytest.mark.parametrize("precision", choices()["precision"])
def test_every_combination_works_or_is_refused(learner: Callable[..., Learner], precision: str) -> None:
    for optimizer, (sums, adapter) in itertools.product(OPTIMIZERS, SUMS_AND_ADAPTERS):
        how = [f"precision={precision}", f"optimizer={optimizer}", f"deterministic={sums}", f"model.adapter={adapter}"]
        how += ["precision.float8.emulate=true"] if precision == "fp8" else []
        how += [] if adapter == "null" else ["start_from=base", "model.adapter.rank=2"]
        if refused := why_not(precision, optimizer, adapter):
            with pytest.raises(UserError, match=refused):
                runs.composed([*SMALL, *how])
            continue
        it = learner(*how, "data.batch=2", "optimizer.lr=0.01", "schedule.warmup=1")
        before = weights(it).clone()
        for _ in range(1 if precision != "fp16" else 8):  # whose scaler has to find its factor
            assert isfinite(float(it.train_step()["loss"])), how
        assert it.failed_at() is None, how
        assert not torch.equal(weights(it), before), how


@pytest.mark.parametrize("how", [["precision=bf16_pure"], [*EMULATED], ["precision=bf16_master"]], ids=lambda h: h[0])
def test_memory_strategies_stay_bitwise_neutral(learner: Callable[..., Learner], how: list[str]) -> None:
    def learned(*more: str) -> Tensor:
        it = learner(*how, "model.dropout=0.2", *more)
        for _ in range(2):
            it.train_step()
        return weights(it)

    assert torch.equal(learned(), learned("memory=checkpoint+offload_activations"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"params": "bfloat16"}, "needs precision.rounding: stochastic, nearest or master"),
        ({"params": "bfloat16", "rounding": "nearest", "compute": "float16"}, "precision.compute=float16 must go"),
        ({"rounding": "stochastic"}, "of bfloat16 parameters, and these are float32"),
        ({"float8": Float8()}, "needs precision.compute=bfloat16"),
        ({"float8": Float8(), "compute": "float16"}, "needs precision.compute=bfloat16"),
    ],
)
def test_formats_that_do_not_go_together_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Precision(**given)  # type: ignore[arg-type]


def test_float8_is_refused_before_anything_is_read_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.composed(["precision=fp8", "parallel.device=cpu"])
    monkeypatch.setattr(type(run.data), "check", lambda self: pytest.fail("data was looked at"))
    with pytest.raises(
        UserError, match=r"compute capability 8\.9 or later .* this cpu device is not: use precision=bf16"
    ):
        build.check(run)
    with pytest.raises(UserError, match="multiplies matrices with sides of 16n"):
        runs.composed(["precision=fp8", "model.width=104"])
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'trainkit\[quant\]'"):
        build.check(runs.composed(EMULATED))


def test_only_the_device_that_has_float8_is_let_by(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    cfg = Precision(compute="bfloat16", float8=Float8())
    for capability, has in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        if has:
            cfg.check(gpu)
        else:
            with pytest.raises(UserError, match="compute capability"):
                cfg.check(gpu)
        assert cfg.to_use(gpu) == (cfg if has else Precision(compute="bfloat16"))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_layers_multiply_in_float8(learner: Callable[..., Learner], recipe: str) -> None:
    it = learner(*EMULATED, f"precision.float8.recipe={recipe}")
    plain = learner("precision=bf16")
    assert it.model.state_dict().keys() == plain.model.state_dict().keys()
    assert torch.equal(weights(it), weights(plain))
    layer = it.model.backbone.blocks[0].mlp.into  # type: ignore[union-attr, index]
    assert isinstance(layer, torch.nn.Linear)
    torch.manual_seed(0)
    x = torch.randn(32, layer.in_features) * torch.logspace(-2, 2, 32)[:, None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x).double()
    rows = recipe == "rowwise"
    reference = float8(x, rows) @ float8(layer.weight, rows).T
    assert float((found - reference).norm() / reference.norm()) < 5e-3  # bfloat16's own rounding
    exact = x.double() @ layer.weight.detach().double().T
    assert float((found - exact).norm() / exact.norm()) > 0.015  # float8's is larger
    float8_layers = [m for m in it.model.modules() if type(m).__name__ == "Float8Linear"]
    assert len(float8_layers) == 2 * 4  # of two blocks; not the head


def float8(x: Tensor, rows: bool) -> Tensor:
    """`x` rounded to 3 bits of mantissa, under a power of two or (a tensor's) exact factor that brings the largest to 448."""
    x = x.detach().double()
    largest = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
    factor = 448 / largest
    factor = 2 ** factor.log2().floor() if rows else factor
    scaled = x * factor
    step = 2.0 ** (scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (scaled / step).round() * step / factor


def test_float8_learns_nearly_the_same(learner: Callable[..., Learner]) -> None:
    def losses(*how: str) -> list[float]:
        it = learner(*how, "optimizer.lr=0.01", "steps=20")
        return [float(it.train_step()["loss"]) for _ in range(20)]

    whole, narrow = losses("precision=bf16"), losses(*EMULATED)
    assert whole != narrow
    assert narrow[-1] == pytest.approx(whole[-1], rel=0.03)
    assert narrow[-1] < 0.95 * narrow[0]
