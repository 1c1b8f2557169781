"""The language-model task: loss and gradients against float64 and torch's own cross-entropy."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_models import model, tokens
from trainkit.tasks import CausalLM, loss
from trainkit.tasks.generate import generate
from trainkit.tasks.loss import summed_loss

ALONE = SimpleNamespace(
    rank=0,
    size=1,
    device=torch.device("cpu"),
    sum=lambda t: t,
    sum_next=lambda model, last: None,
    finish_sums=lambda: None,
    pace=SimpleNamespace(forward_done=lambda: None),
)


def ragged(rows: int = 6, length: int = 12) -> dict[str, Tensor]:
    x = tokens(rows, length + 1)
    labels = x[:, 1:].clone()
    for row in range(rows):
        labels[row, : 2 * row] = -100
    documents = torch.zeros(rows, length, dtype=torch.int32)
    documents[1, 4:] = 1
    return {"tokens": x[:, :-1], "labels": labels, "documents": documents, "bytes": (labels >= 0).sum(1) * 2}


def operands(dtype: torch.dtype, vocab: int = 7000) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 20, 8, generator=draw).to(dtype).requires_grad_()
    unembed = torch.randn(vocab, 8, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (3, 20), generator=draw)
    labels[0, :7] = -100
    return hidden, unembed, labels


@pytest.mark.parametrize("vocab", [50, 7000])
@pytest.mark.parametrize(("whole", "chunk"), [(1 << 22, 1), (0, 1 << 25), (0, 7 * 7000), (0, 1)])
def test_the_loss_and_its_gradients_are_those_of_torch(
    vocab: int, whole: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "WHOLE", whole)
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, unembed, labels = operands(torch.float64, vocab)
    ours = summed_loss(hidden, unembed, labels)
    mine = torch.autograd.grad(3.0 * ours, [hidden, unembed])
    logits = F.linear(hidden, unembed).flatten(0, 1)
    theirs = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(3.0 * theirs, [hidden, unembed])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(hidden, unembed, labels), theirs, rtol=1e-12, atol=0)


def test_low_precision_products_keep_a_wide_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WHOLE", 0)
    monkeypatch.setattr(loss, "CHUNK", 7 * 7000)
    hidden, unembed, labels = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = summed_loss(hidden, unembed, labels)
    assert ours.dtype == torch.float32
    grads = torch.autograd.grad(ours * 2.0**16, [hidden, unembed])
    assert all(g.dtype == torch.float32 for g in grads)
    logits = F.linear(hidden.double(), unembed.double()).flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)
    expected = torch.autograd.grad(exact, [hidden, unembed])
    for grad, wide in zip(grads, expected, strict=True):
        assert float((grad / 2.0**16 - wide).norm() / wide.norm()) < 2e-2


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_microbatches_add_up_on_ragged_labels(rows: int) -> None:
    grads = []
    for micro in (6, rows):
        it = model()
        found = CausalLM().backward(it, ragged(), microbatch=micro, ranks=ALONE)
        grads.append([p.grad for p in it.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-13)
    batch, it = ragged(), model()
    logits = it(batch["tokens"], None, batch["documents"]).flatten(0, 1)
    mean = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(found["loss"], mean.detach(), rtol=1e-12, atol=0)
    mean.backward()
    torch.testing.assert_close([p.grad for p in it.parameters()], grads[0], rtol=1e-9, atol=1e-12)


def test_ranks_divide_by_the_global_count() -> None:
    batch = ragged()
    whole = model()
    CausalLM().backward(whole, batch, microbatch=6, ranks=ALONE)
    count = (batch["labels"] >= 0).sum()
    summed = [torch.zeros_like(p) for p in whole.parameters()]
    for rank in range(2):
        part = {k: v[rank * 3 : rank * 3 + 3] for k, v in batch.items()}
        it = model()
        ranks = SimpleNamespace(**{**vars(ALONE), "sum": lambda t: count if t.dtype == torch.int64 else t})
        CausalLM().backward(it, part, microbatch=2, ranks=ranks)
        summed = [s + p.grad for s, p in zip(summed, it.parameters(), strict=True)]
    torch.testing.assert_close(summed, [p.grad for p in whole.parameters()], rtol=1e-11, atol=1e-13)


def test_a_batch_without_labels_is_no_division_by_zero() -> None:
    batch, it = ragged(), model()
    batch["labels"][:] = -100
    assert float(CausalLM().backward(it, batch, microbatch=2, ranks=ALONE)["loss"]) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in it.parameters())


def test_evaluation_measures_what_it_says() -> None:
    batch, it = ragged(), model(dropout=0.5)
    found = CausalLM().evaluate(it, [batch, batch], ranks=ALONE, stop=lambda: False)
    assert found is not None
    assert it.training
    it.eval()
    logits = it(batch["tokens"], None, batch["documents"]).flatten(0, 1)
    nats = float(F.cross_entropy(logits.detach(), batch["labels"].flatten(), ignore_index=-100))
    assert found["val_loss"] == pytest.approx(nats, rel=1e-9)
    assert found["val_perplexity"] == pytest.approx(math.exp(nats), rel=1e-9)
    assert found["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / 2, rel=1e-9)  # two bytes a token
    assert set(found) == set(CausalLM.metrics)


TWICE = SimpleNamespace(**{**vars(ALONE), "size": 2, "sum": lambda t: 2 * t})  # two ranks with the same rows


def test_metrics_are_those_of_all_ranks() -> None:
    found = [CausalLM().backward(model(), ragged(), microbatch=4, ranks=ranks)["loss"] for ranks in (ALONE, TWICE)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    batch = ragged()
    other = {**batch, "labels": torch.full_like(batch["labels"], -100), "bytes": torch.zeros(6)}
    sums = []

    def add(t: Tensor) -> Tensor:
        sums.append(t.clone())
        return t

    ranks = SimpleNamespace(**{**vars(ALONE), "sum": add})
    one, two = (CausalLM().evaluate(model(), [b], ranks=ranks, stop=lambda: False) for b in (batch, other))
    assert one is not None
    assert two is not None
    assert all(math.isnan(value) for value in two.values())  # nothing measured is not a loss of 0
    ranks = SimpleNamespace(**{**vars(ALONE), "sum": lambda t: sums[0] + t})  # this rank has no labels, the other has
    assert CausalLM().evaluate(model(), [other], ranks=ranks, stop=lambda: False) == one


def test_a_scaler_scales_the_gradient_and_not_the_loss() -> None:
    plain, scaled = model(), model()
    found = [
        CausalLM().backward(plain, ragged(), microbatch=4, ranks=ALONE)["loss"],
        CausalLM().backward(scaled, ragged(), microbatch=4, ranks=ALONE, scale=lambda loss: loss * 8)["loss"],
    ]
    assert torch.equal(*found)
    assert not found[0].requires_grad
    expected = [p.grad * 8 for p in plain.parameters()]
    torch.testing.assert_close([p.grad for p in scaled.parameters()], expected, rtol=1e-12, atol=0)


def test_a_batch_of_whole_documents_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path: torch's causal attention without a mask, in every microbatch."""
    batch, masks = ragged(), []
    real = F.scaled_dot_product_attention

    def attention(*args: Any, attn_mask: Tensor | None, is_causal: bool, **how: Any) -> Tensor:
        masks.append((attn_mask is None, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    CausalLM().backward(model(), batch, microbatch=3, ranks=ALONE)
    assert set(masks) == {(False, False)}
    masks.clear()
    del batch["documents"]
    CausalLM().backward(model(), batch, microbatch=3, ranks=ALONE)
    assert set(masks) == {(True, True)}


def test_evaluation_stops_when_asked() -> None:
    asked = iter([False, True])
    assert CausalLM().evaluate(model(), [ragged()] * 5, ranks=ALONE, stop=lambda: next(asked)) is None


def written(it: torch.nn.Module, **how: Any) -> list[int]:
    return list(generate(it, [1, 2, 3], **({"tokens": 20, "context": 32} | how)))


def test_greedy_writing_is_the_argmax_of_the_whole_row() -> None:
    it = model()
    history = [1, 2, 3]
    for _ in range(20):
        history.append(int(it(torch.tensor([history]))[0, -1].argmax()))
    assert written(it, temperature=0) == history[3:]


def test_drawing_is_by_seed_and_disturbs_nothing() -> None:
    it = model(dropout=0.5)
    state = torch.get_rng_state()
    assert written(it, seed=1) == written(it, seed=1)
    assert written(it, seed=1) != written(it, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert it.training
    assert written(it, top_k=1) == written(it, temperature=0) == written(it, top_p=0.0)


def test_drawing_follows_the_probabilities() -> None:
    it = model()
    logits = it(torch.tensor([[1, 2, 3]]))[0, -1].detach().float()
    first = [written(it, tokens=1, seed=s, temperature=2.0)[0] for s in range(600)]
    exact = (logits / 2).softmax(0)
    drawn = torch.bincount(torch.tensor(first), minlength=40) / 600
    assert float((drawn - exact).abs().max()) < 0.07
    kept = exact.sort(descending=True)
    nucleus = set(kept.indices[: int((kept.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert {written(it, tokens=1, seed=s, temperature=2.0, top_p=0.5)[0] for s in range(100)} <= nucleus


def test_writing_goes_on_when_the_context_is_full_and_ends_at_the_end() -> None:
    it = model()
    assert len(written(it, tokens=90, temperature=0)) == 90
    first = written(it, temperature=0)
    assert written(it, temperature=0, stop=first[4]) == first[: first.index(first[4])]
