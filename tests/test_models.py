"""The decoder and its parts, against transformers and against plain arithmetic."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_choices import NEEDS
from trainkit import run as runs
from trainkit.choices import choices
from trainkit.hf import names
from trainkit.models import Decoder
from trainkit.models.attention import Attention
from trainkit.models.mlp import MLP, activate
from trainkit.tasks import CausalLM

KINDS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position": "learned"},
    "grouped": {"attention": Attention(heads=4, kv_heads=2)},
    "window": {"attention": Attention(heads=4, window=3)},
    "qk_norm": {"attention": Attention(heads=4, kv_heads=1, head_width=6, qk_norm=True)},
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True, "mlp": MLP(activation="gelu_tanh")},
}


def decoder(**other: Any) -> Decoder:
    base: dict[str, Any] = {
        "vocab": 40,
        "width": 16,
        "depth": 2,
        "context": 32,
        "attention": Attention(heads=4),
        "mlp": MLP(activation="swiglu", hidden=24),
    }
    return Decoder(**(base | other))


def model(**other: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    made = CausalLM().build(decoder(**other).build()).double()
    for parameter in made.parameters():  # biases and gains that do nothing would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", [name for name in choices()["model"] if name != "hf"])
def test_a_preset_has_the_parameters_that_it_says(name: str) -> None:
    cfg = runs.composed([f"model={name}", *NEEDS.get(f"model={name}", [])]).model
    with torch.device("meta"):
        backbone = CausalLM().build(cfg.build())
    count = sum(p.numel() for p in backbone.parameters())
    assert cfg.parameters() == count
    if size := re.fullmatch(r"M(\d+)(B?)", name):
        named = int(size[1]) * (1e9 if size[2] else 1e6)
        assert abs(count / named - 1) < 0.05
    known = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert count == known.get(name, count)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_by_arithmetic(kind: str) -> None:
    for tied in (True, False):
        cfg = decoder(tied=tied, **KINDS[kind])
        assert cfg.parameters() == sum(p.numel() for p in cfg.build().parameters())


def test_flops_are_those_of_the_matrix_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cfg = decoder(attention=Attention(heads=4, kv_heads=2))
    it = CausalLM().build(cfg.build())
    x = tokens(1, 32)
    with FlopCounterMode(display=False) as counted:
        it(x, x).backward()
    heads, _, k = cfg.attention.shape(cfg.width)
    whole = 2 * 2 * 32 * 32 * heads * k * cfg.depth  # the counter takes attention as a full square, and its backward
    square = sum(v for op, v in counted.get_flop_counts()["Global"].items() if "attention" in str(op))
    products = counted.get_total_flops() - square
    ours = cfg.flops_per_token(32) * 32
    assert ours - products == pytest.approx(3 * whole * (33 / 64), rel=1e-9)  # half of it, and the diagonal


def gpt2() -> tuple[Any, torch.nn.Module]:
    import transformers

    torch.manual_seed(0)
    cfg = transformers.GPT2Config(vocab_size=99, n_positions=32, n_embd=24, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(cfg).double().eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=0.2)
    overrides = ["model=gpt2", "model.vocab=99", "model.context=32", "model.width=24", "model.depth=3"]
    ours = CausalLM().build(
        runs.composed([*overrides, "model.attention.heads=4", "data.length=32", "data=text"]).model.build()
    )
    ours = ours.double()
    ours.backbone.load_state_dict(names.ours(theirs.state_dict(), list(ours.backbone.state_dict()), "gpt2"))
    return theirs, ours


def test_gpt2_gives_the_logits_of_transformers() -> None:
    theirs, ours = gpt2()
    x = torch.randint(0, 99, (3, 32))
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-10)


def test_gpt2_has_the_gradients_of_transformers() -> None:
    theirs, ours = gpt2()
    x = torch.randint(0, 99, (3, 32))
    shifted = torch.cat([x[:, 1:], torch.full((3, 1), -100)], 1)
    ours(x, shifted).backward()
    logits = theirs(x).logits[:, :-1].flatten(0, 1)  # its own loss is float32
    F.cross_entropy(logits, x[:, 1:].flatten(), reduction="sum").backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    expected = names.ours(gradients, [n for n, _ in ours.backbone.named_parameters()], "gpt2")
    for name, parameter in ours.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_seen(kind: str) -> None:
    it, x = model(**KINDS[kind]), tokens()
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 40
    before, after = it(x), it(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_row_do_not_see_each_other(kind: str) -> None:
    it = model(**KINDS[kind])
    x = tokens(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12])
    packed = it(x, None, documents)
    apart = [it(x[:1, a:b]) for a, b in ((0, 5), (5, 9), (9, 12))]
    torch.testing.assert_close(packed[:1], torch.cat(apart, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[1:], it(x[1:]), rtol=0, atol=1e-12)
    changed = x.clone()
    changed[0, 5:9] = (changed[0, 5:9] + 1) % 40
    moved = (it(changed, None, documents) - packed).detach()
    assert float(moved[0, :5].abs().max()) == float(moved[0, 9:].abs().max()) == float(moved[1].abs().max()) == 0
    it.backbone.embed.weight.requires_grad_(False)
    seen = it.backbone.embed(x).detach().requires_grad_()
    it.backbone.embed.forward = lambda _: seen
    it(x, None, documents)[0, 5:9].sum().backward()
    assert float(seen.grad[0, :5].abs().max()) == float(seen.grad[0, 9:].abs().max()) == 0  # type: ignore[index]


def test_grouped_heads_are_repeated_heads() -> None:
    few, many = model(attention=Attention(heads=4, kv_heads=2)), model()
    theirs = dict(many.named_parameters())
    with torch.no_grad():
        for name, parameter in few.named_parameters():
            if "qkv" in name:
                q, k, v = parameter.split([16, 8, 8])
                repeated = [p.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16) for p in (k, v)]
                theirs[name].copy_(torch.cat([q, *repeated]))
            else:
                theirs[name].copy_(parameter)
    torch.testing.assert_close(few(tokens()), many(tokens()), rtol=0, atol=1e-12)


def test_a_window_sees_only_so_far() -> None:
    it = model(depth=1, attention=Attention(heads=4, window=3))
    x = tokens(1, 12)
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 40
    moved = (it(changed) - it(x)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [4 <= i < 7 for i in range(12)]


def test_qk_norm_makes_the_scale_of_queries_not_matter() -> None:
    it, x = model(**KINDS["qk_norm"]), tokens()
    before = it(x)
    with torch.no_grad():
        for block in it.backbone.blocks:
            block.attention.qkv.weight[: 4 * 6] *= 50.0
    torch.testing.assert_close(it(x), before, rtol=1e-3, atol=1e-3)


NAIVE = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "swiglu": lambda x: x[..., :8] / (1 + torch.exp(-x[..., :8])) * x[..., 8:],
    "geglu": lambda x: NAIVE["gelu"](x[..., :8]) * x[..., 8:],
}


@pytest.mark.parametrize("name", NAIVE)
def test_activations(name: str) -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(activate(x, name), NAIVE[name](x), rtol=0, atol=1e-12)


def test_residual_outputs_start_smaller() -> None:
    torch.manual_seed(0)
    backbone = decoder(width=128, depth=8, mlp=MLP(activation="gelu"), vocab=500).build()
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 2:
            smaller = name.endswith(("attention.out.weight", "mlp.out.weight"))
            assert float(parameter.detach().std()) == pytest.approx(0.02 / (4 if smaller else 1), rel=0.05), name


def test_dropout_drops_in_training_only() -> None:
    it = model(dropout=0.5)
    assert not torch.equal(it(tokens()), it(tokens()))
    it.eval()
    assert torch.equal(it(tokens()), it(tokens()))
    torch.testing.assert_close(it(tokens()), model()(tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_positions_give_the_same_logits(kind: str) -> None:
    from trainkit.models.attention import Cache

    it, x = model(**KINDS[kind]), tokens(2, 12)
    caches = [Cache() for _ in it.backbone.blocks]
    whole = it(x)
    for a, b in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 12)):
        last = it(x[:, a:b], caches=caches, seen=a)
        torch.testing.assert_close(last, whole[:, b - 1 : b], rtol=0, atol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width=16 is not a multiple of attention.heads=3"):
        decoder(attention=Attention(heads=3))
    with pytest.raises(ValueError, match="attention.heads=4 is not a multiple of attention.kv_heads=3"):
        decoder(attention=Attention(heads=4, kv_heads=3))
    with pytest.raises(ValueError, match="rope turns pairs"):
        decoder(attention=Attention(heads=4, head_width=5))


def test_the_loss_head_is_f_linear() -> None:
    it = model(tied=False)
    hidden = it.backbone(tokens())
    torch.testing.assert_close(it(tokens()), F.linear(hidden, it.backbone.head.weight))
