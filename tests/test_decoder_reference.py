"""The decoder against one written out plainly: a loop over documents, heads and queries, complex numbers for RoPE."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_models import decoder, model, tokens
from trainkit.models.attention import Attention
from trainkit.models.decoder import Decoder
from trainkit.models.mlp import MLP

VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"rope_theta": 50.0},
    "learned": {"position": "learned", "norm": "layernorm", "bias": True, "mlp": MLP(activation="gelu_tanh")},
    "layernorm": {"norm": "layernorm", "norm_eps": 0.1, "tied": False, "mlp": MLP(activation="relu2", hidden=20)},
    "grouped": {"attention": Attention(heads=4, kv_heads=2), "mlp": MLP(activation="geglu", hidden=20), "bias": True},
    "one_key_head": {"attention": Attention(heads=4, kv_heads=1, head_width=6), "norm_eps": 0.1},
    "window": {"attention": Attention(heads=4, window=3)},
    "wide_window": {"attention": Attention(heads=4, window=11), "position": "learned"},
    "qk_norm": {"attention": Attention(heads=4, qk_norm=True), "norm_eps": 0.1},
    "all": {"attention": Attention(heads=6, kv_heads=2, head_width=4, window=4, qk_norm=True), "rope_theta": 500.0},
}
PACKED = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 12])
ACTIVATIONS = {
    "gelu_tanh": lambda h: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    "relu2": lambda h: torch.where(h > 0, h * h, 0),
}
GATES = {"swiglu": lambda g: g * torch.sigmoid(g), "geglu": lambda g: g * (1 + torch.erf(g / math.sqrt(2))) / 2}


class Plain:
    """One document at a time; `drop` stands where the model drops something out."""

    def __init__(self, cfg: Decoder, weights: dict[str, Tensor], drop: float = 1.0) -> None:
        self.cfg, self.weights, self.drop = cfg, weights, drop

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name: str, x: Tensor, rms: bool) -> Tensor:
        x = x if rms else x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.cfg.norm_eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0)

    def turned(self, x: Tensor) -> Tensor:
        if self.cfg.position != "rope":
            return x
        half = x.shape[-1] // 2
        speed = self.cfg.rope_theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones(len(x), half).double(), torch.arange(len(x)).double()[:, None] * speed)
        z = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def attention(self, block: str, x: Tensor) -> Tensor:
        heads, groups, k = self.cfg.attention.shape(self.cfg.width)
        q, key, v = self.linear(f"{block}.qkv", x).split([heads * k, groups * k, groups * k], -1)
        window = self.cfg.attention.window or len(x)
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            mine, theirs, value = q[:, head * k :][:, :k], key[:, group * k :][:, :k], v[:, group * k :][:, :k]
            if self.cfg.attention.qk_norm:
                mine, theirs = self.norm(f"{block}.q_norm", mine, True), self.norm(f"{block}.k_norm", theirs, True)
            mine, theirs = self.turned(mine), self.turned(theirs)
            rows = []
            for i in range(len(x)):
                seen = range(max(0, i - window + 1), i + 1)
                powers = torch.stack([(mine[i] @ theirs[j] / math.sqrt(k)).exp() for j in seen])
                rows.append(sum(p / powers.sum() * value[j] for p, j in zip(powers, seen, strict=True)))
            mixed.append(torch.stack(rows))
        return self.linear(f"{block}.out", torch.cat(mixed, -1))

    def mlp(self, block: str, x: Tensor) -> Tensor:
        h, name = self.linear(f"{block}.into", x), self.cfg.mlp.activation
        if name in GATES:
            half = h.shape[-1] // 2
            return self.linear(f"{block}.out", GATES[name](h[:, :half]) * h[:, half:])
        return self.linear(f"{block}.out", ACTIVATIONS[name](h))

    def logits(self, document: Tensor) -> Tensor:
        rms = self.cfg.norm == "rmsnorm"
        x = self.weights["embed.weight"][document]
        if self.cfg.position == "learned":
            x = x + self.weights["position.weight"][: len(document)]
        x = x * self.drop
        for i in range(self.cfg.depth):
            block = f"blocks.{i}"
            x = x + self.drop * self.attention(f"{block}.attention", self.norm(f"{block}.attention_norm", x, rms))
            x = x + self.drop * self.mlp(f"{block}.mlp", self.norm(f"{block}.mlp_norm", x, rms))
        head = self.weights["embed.weight" if self.cfg.tied else "head.weight"]
        return self.norm("norm", x, rms) @ head.T


def plain(it: nn.Module, x: Tensor, documents: Tensor, drop: float = 1.0) -> Tensor:
    reference = Plain(it.backbone.cfg, it.backbone.state_dict(), drop)  # type: ignore[arg-type, union-attr, operator]
    rows = []
    for row, belongs in zip(x, documents, strict=True):
        rows.append(torch.cat([reference.logits(row[belongs == d]) for d in belongs.unique()]))
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_what_it_says(variant: str) -> None:
    it, x = model(**VARIANTS[variant]).eval(), tokens()
    whole = torch.zeros_like(x)
    torch.testing.assert_close(it(x), plain(it, x, whole), rtol=0, atol=1e-11)
    torch.testing.assert_close(it(x, None, PACKED), plain(it, x, PACKED), rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_document_changes_no_logit_and_no_gradient(variant: str) -> None:
    """Exactly: not one bit of the gradient that a document's loss sends into the weights knows the other's tokens."""
    it, x = model(**VARIANTS[variant]), tokens()
    changed = x.clone()
    changed[0, :6] = (changed[0, :6] + 7) % 40
    labels = torch.full_like(x, -100)
    labels[0, 6:] = x[0, 6:]
    logits, grads = [], []
    for some in (x, changed):
        it.zero_grad()
        it(some, labels, PACKED).backward()
        logits.append(it(some, None, PACKED)[0, 6:])
        grads.append([p.grad for n, p in it.named_parameters() if "embed" not in n])
    assert torch.equal(*logits)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_what_is_dropped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings, what each half of a block adds, and attention's probabilities: as GPT-2."""
    asked = []

    def attention(*args: Any, dropout_p: float, **kwargs: Any) -> Tensor:
        asked.append(dropout_p)
        return real(*args, **kwargs)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * self.p if self.training else x)
    it, x = model(dropout=0.25), tokens()
    torch.testing.assert_close(it(x), plain(it, x, torch.zeros_like(x), drop=0.25), rtol=0, atol=1e-11)
    torch.testing.assert_close(it.eval()(x), plain(it, x, torch.zeros_like(x)), rtol=0, atol=1e-11)
    assert asked == [0.25, 0.25, 0, 0]


def test_a_window_costs_what_it_sees() -> None:
    for window in (1, 3, 12, 50):
        cfg, none = (
            decoder(attention=Attention(heads=4, window=window)),
            decoder(attention=Attention(heads=4, window=1)),
        )
        pairs = sum(min(i + 1, window) for i in range(12)) - 12
        heads, _, k = cfg.attention.shape(cfg.width)
        extra = 12 * heads * k * cfg.depth * pairs / 12
        assert cfg.flops_per_token(12) - none.flops_per_token(12) == pytest.approx(extra, rel=1e-12)


def test_the_usual_hidden_width() -> None:
    assert MLP(activation="gelu").width(384) == 1536
    assert [MLP(activation="swiglu").width(w) for w in (128, 384, 512, 768)] == [384, 1024, 1408, 2048]
    assert MLP(activation="swiglu", hidden=77).width(512) == 77


def test_weights_do_not_depend_on_where_a_backbone_is_made() -> None:
    cfg = decoder(bias=True, tied=False, attention=Attention(heads=4, qk_norm=True), position="learned")
    torch.manual_seed(3)
    here = cfg.build()
    torch.manual_seed(3)
    with torch.device("meta"):
        there = cfg.build()
    there.to_empty(device="cpu")
    there.init_weights()  # type: ignore[operator]
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert name.endswith(("norm.weight", "bias")) or float(a.detach().std()) > 0


@pytest.mark.parametrize("documents", [None, PACKED])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_step_is_one_graph(documents: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with its chunked loss, and a block alone, compile without a break."""
    monkeypatch.setattr("trainkit.tasks.loss.WHOLE", 0)
    monkeypatch.setattr("trainkit.tasks.loss.CHUNK", 400)
    it, x = model(**VARIANTS["all"]), tokens()
    loss = it(x, x, documents)
    loss.backward()
    expected = [p.grad for p in it.parameters()]
    it.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(it, backend="aot_eager", fullgraph=True)
    found = compiled(x, x, documents)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close([p.grad for p in it.parameters()], expected, rtol=1e-10, atol=1e-12)
    for block in it.backbone.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager", fullgraph=True)  # type: ignore[operator]
    torch.testing.assert_close(it(x, x, documents), loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()
