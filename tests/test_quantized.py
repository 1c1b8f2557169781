"""Weights in 8 and 4 bits: the formats against brute force and against others' numbers, and the layers that hold them."""

import json
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from trainkit import build, cli
from trainkit.models.quantized import FrozenLinear, decode, encode, quantize, values

FORMS = ["int8", "int4", "nf4"]


def held_in(weight: torch.Tensor, form: str, double: bool = False) -> FrozenLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return FrozenLinear(linear, form, double)  # type: ignore[arg-type]


def test_nf4_is_the_quantiles_of_a_normal_distribution() -> None:
    normal = statistics.NormalDist()
    outermost = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))  # of the paper: half way between those of 15 and of 16 equal parts

    def quantiles(count: int) -> list[float]:
        return [normal.inv_cdf(outermost + (0.5 - outermost) * i / count) for i in range(count)]

    known = sorted([0.0, *quantiles(8), *(-q for q in quantiles(7))])
    torch.testing.assert_close(values("nf4"), torch.tensor(known) / max(known), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 13), (3, 64), (7, 33), (1, 1)])
@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_four_bits_are_the_nearest_value_of_each_block(form: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    flat = weight.flatten().tolist()
    known = values(form).tolist()  # type: ignore[arg-type]
    expected = []
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        scale = max(map(abs, block))
        expected += [min((abs(scale * k - w), scale * k) for k in known)[1] for w in block]
    layer = held_in(weight, form)
    torch.testing.assert_close(layer.whole(torch.float32).flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert layer.held[0].numel() == -(-len(flat) // 2)


def test_four_bits_lie_as_bitsandbytes_has_them() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="only this comparison needs bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = encode(weight, "nf4")
    assert torch.equal(ours["scales"], state.absmax)
    assert (ours["codes"] == packed.flatten()).float().mean() > 0.999  # a number between two values may go either way
    known = held_in(weight, "nf4")
    known.codes.data.copy_(packed.flatten())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(known.whole(torch.float32), functional.dequantize_4bit(packed, state))


def test_int8_is_torchaos() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    ours = FrozenLinear(linear, "int8")
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    theirs = linear.weight.qdata  # type: ignore[union-attr]
    away = (ours.held[0].int() - theirs.int()).abs()  # they round against -128 to 127, we against -127 to 127
    assert int(away.max()) <= 1
    x = torch.randn(4, 48)
    torch.testing.assert_close(ours(x), linear(x), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_lost_is_small_and_zeros_stay(form: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    weight[3] = 0
    whole = held_in(weight, form).whole(torch.float32)
    relative = float((whole - weight).norm() / weight.norm())
    low, high = {"int8": (0.002, 0.01), "int4": (0.09, 0.13), "nf4": (0.07, 0.1)}[form]
    assert low < relative < high
    assert torch.equal(whole[3], weight[3])
    assert torch.isfinite(whole).all()


def test_double_quantization_loses_little_more_and_takes_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 192) * torch.logspace(-1, 0, 256)[:, None]
    one, two = held_in(weight, "nf4"), held_in(weight, "nf4", double=True)
    bits = [8 * sum(t.nbytes for t in layer.held) / weight.numel() for layer in (one, two)]
    assert bits[0] == 4.5
    assert bits[1] == pytest.approx(4.127, abs=0.01)
    a, b = (float((layer.whole(torch.float32) - weight).norm() / weight.norm()) for layer in (one, two))
    assert a < b < 1.02 * a


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_is_the_plain_one_of_its_whole_weight(form: str | None, double: bool) -> None:
    if double and form in (None, "int8"):
        return
    torch.manual_seed(0)
    plain = nn.Linear(24, 10).double()
    layer = FrozenLinear(plain, form, double).double()  # type: ignore[arg-type]
    whole = nn.Linear(24, 10).double()
    whole.load_state_dict({"weight": layer.whole(torch.float64), "bias": plain.bias})
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    (layer(x) ** 2).sum().backward()
    (whole(y) ** 2).sum().backward()
    assert torch.allclose(layer(x), whole(y), rtol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in layer.parameters())
    assert set(layer.state_dict()) == {*layer.names, "bias"}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_is_kept_for_backward(form: str) -> None:
    layer = FrozenLinear(nn.Linear(256, 256, bias=False), form)  # type: ignore[arg-type]
    kept: list[int] = []
    own = {t.data_ptr() for t in [*layer.parameters(), layer.pairs] if t is not None}
    x = torch.randn(2, 256, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in own else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum().backward()
    assert sum(kept) <= x.nbytes


def test_decoding_gives_the_dtype_that_is_asked_for() -> None:
    weight = torch.randn(8, 8)
    for form in FORMS:
        layer = held_in(weight, form)
        assert decode(layer.held, layer.pairs, layer.shape, torch.bfloat16).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


def test_a_checkpoint_is_evaluated_and_written_with_in_fewer_bits(
    trained: Callable[..., build.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trained("model.mlp.hidden=256", "optimizer.lr=0.01", name="t")

    def said(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(words))
        found = capsys.readouterr()
        return found.out if left.value.code == 0 else f"{left.value.code} {found.err}"

    whole, *narrow = (
        json.loads(said("evaluate", "t", "--json", *(["--quantize", form] if form else []))) for form in ("", *FORMS)
    )
    for form, found in zip(FORMS, narrow, strict=True):
        assert found["val_loss"] != whole["val_loss"]
        assert found["val_loss"] == pytest.approx(whole["val_loss"], rel=0.01)
        assert found["weight_bytes"] < {"int8": 0.5, "int4": 0.43, "nf4": 0.43}[form] * whole["weight_bytes"]
    assert "blocks in nf4" in said("evaluate", "t", "--quantize", "nf4")
    assert said("generate", "t", "--tokens", "3", "--prompt", "the", "--quantize", "int4").startswith("the")
    assert said("evaluate", "t", "--quantize", "int9") == (
        "2 trainkit: --quantize int9 is not a format; did you mean 'int8' or 'int4'?\n"
    )


def test_the_head_and_the_norms_stay(learner: Callable[..., build.Learner]) -> None:
    model = learner("model.tied=false").model
    names = {name for name, _ in quantize(model, "nf4").named_parameters()}
    assert {"backbone.embed.weight", "backbone.head.weight", "backbone.norm.weight"} <= names
    assert sum(name.endswith(".codes") for name in names) == 2 * 4
    assert SMALL  # of two blocks
