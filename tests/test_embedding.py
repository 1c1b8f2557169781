"""The embedding task: losses against brute force in float64, gradients over microbatches and ranks, pooling and
padding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_causal_lm import ALONE
from trainkit.errors import UserError
from trainkit.models import Decoder
from trainkit.models.attention import Attention
from trainkit.models.mlp import MLP
from trainkit.tasks import Embedding, embedding_loss

LOSSES: list[dict[str, Any]] = [
    {"loss": "info_nce"},
    {"loss": "info_nce", "symmetric": False, "learn_temperature": True},
    {"loss": "info_nce", "matryoshka": (4, 8), "false_negatives": 0.1},
    {"loss": "triplet", "margin": 0.5},
    {"loss": "cosent"},
    {"loss": "angle", "matryoshka": (8, 6)},
    {"loss": "distill"},
]
IDS = ["info_nce", "learned", "matryoshka", "triplet", "cosent", "angle", "distill"]
N = 6


def model(task: Embedding, dtype: torch.dtype = torch.float64, **shape: Any) -> torch.nn.Module:
    causal = shape.pop("causal", False)
    torch.manual_seed(0)
    config = Decoder(
        **{
            "vocab": 40,
            "width": 8,
            "depth": 2,
            "context": 32,
            "attention": Attention(heads=2, causal=causal),
            "mlp": MLP(activation="swiglu"),
            "init_std": 0.5,
            **shape,
        }
    )
    task.check(config)
    return task.build(config.build()).to(dtype)


def batch(rows: int = N, texts: int = 3) -> dict[str, Tensor]:
    """Rows of ragged texts, some of them twice, and a hard negative that is not there."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 8, (rows, texts), generator=draw)
    made: dict[str, Tensor] = {"lengths": lengths, "ids": torch.arange(rows)}
    for column in range(texts):
        made[f"tokens{column}"] = torch.randint(0, 40, (rows, int(lengths[:, column].max())), generator=draw)
    made["texts"] = torch.arange(rows * texts).reshape(rows, texts)
    made["texts"][3, 0] = made["texts"][1, 0]  # the same anchor twice, so that the two positives are not wrong
    made["texts"][4, 1] = made["texts"][2, 1]  # the same positive twice
    if texts > 2:
        made["texts"][5, 2] = -1
    made["scores"] = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 2.0])[:rows]
    made["teacher"] = torch.randn(rows, texts, 8, generator=draw)
    return made


def learned(
    task: Embedding, it: torch.nn.Module, data: dict[str, Tensor], microbatch: int
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(5)
    found = task.backward(it, data, microbatch=microbatch, ranks=ALONE)
    return found["loss"], [p.grad if p.grad is not None else torch.zeros_like(p) for p in it.parameters()]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Gradients are as good as equal: no number is further off than `tolerance` times the largest of its tensor."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()) + 1e-15)


def vectors(it: torch.nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Each text alone and without padding."""
    rows, texts = data["lengths"].shape
    return torch.stack(
        [
            torch.cat(
                [
                    it(data[f"tokens{c}"][r : r + 1, : data["lengths"][r, c]], data["lengths"][r : r + 1, c])
                    for c in range(texts)
                ]
            )
            for r in range(rows)
        ]
    )


def brute(task: Embedding, v: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The loss by its definition, one number at a time."""
    widths = task.matryoshka or (v.shape[-1],)
    return sum((_brute(task, v, w, data) for w in widths), torch.zeros(())) / len(widths)


def _brute(task: Embedding, v: Tensor, width: int, data: dict[str, Tensor]) -> Tensor:
    texts = data["texts"].tolist()
    rows = range(len(texts))
    unit = [[v[i, c, :width] / v[i, c, :width].norm() for c in range(v.shape[1])] for i in rows]
    size = v[0, 0].norm() ** 2 if task.learn_temperature else 1 / task.temperature
    total = torch.zeros((), dtype=v.dtype)
    match task.loss:
        case "info_nce":
            for i in rows:
                total = total - _log_share(task, unit, texts, i, 0, size)
                if task.symmetric:
                    total = total - _log_share(task, unit, texts, i, 1, size)
            return total / len(texts) / (2 if task.symmetric else 1)
        case "triplet":
            for i in rows:
                there = [c for c in range(2, v.shape[1]) if texts[i][c] != -1]
                for c in there:
                    near, far = ((unit[i][0] - unit[i][k]).norm() ** 2 for k in (1, c))
                    total = total + torch.relu(task.margin + near - far) / len(there)
            return total / len(texts)
        case "distill":
            for i in rows:
                there = [c for c in range(v.shape[1]) if texts[i][c] != -1]
                for c in there:
                    teacher = data["teacher"][i, c].to(v.dtype)
                    total = total + (unit[i][c] - teacher / teacher.norm()).norm() ** 2 / len(there)
            return total / len(texts)
    similar = [unit[i][0] @ unit[i][1] if task.loss == "cosent" else _angle(unit[i][0], unit[i][1]) for i in rows]
    scores = data["scores"].tolist()
    wrong = [torch.exp(task.scale * (similar[j] - similar[i])) for i in rows for j in rows if scores[i] > scores[j]]
    return torch.log(1 + sum(wrong))


def _angle(x: Tensor, y: Tensor) -> Tensor:
    half = len(x) // 2
    z, w = torch.complex(x[:half], x[half:]), torch.complex(y[:half], y[half:])
    quotient = z * w.conj() / (z.abs().square().sum().sqrt() * w.abs().square().sum().sqrt())
    return (quotient.real + quotient.imag).sum().abs()


def _log_share(task: Embedding, unit: Any, texts: Any, i: int, side: int, size: Any) -> Tensor:
    query, own = unit[i][side], unit[i][1 - side]
    columns = [0] if side else range(1, len(texts[0]))
    kept = [torch.exp(size * query @ own)]
    for c in columns:
        for j in range(len(texts)):
            same = {texts[i][0], texts[i][1], -1}
            wrong = texts[j][c] not in same
            wrong = wrong and not (c < 2 and texts[j][1 - c] == texts[i][side])
            if task.false_negatives is not None:
                wrong = wrong and bool(query @ unit[j][c] <= query @ own + task.false_negatives)
            if (j != i and wrong) or (c > 1 and j == i and wrong):
                kept.append(torch.exp(size * query @ unit[j][c]))
    return torch.log(kept[0] / sum(kept))


@pytest.mark.parametrize("words", LOSSES, ids=IDS)
def test_the_loss_is_its_definition(words: dict[str, Any]) -> None:
    task, data = Embedding(**words), batch()
    it = model(task)
    loss, grads = learned(task, it, data, N)
    other = model(task)
    expected = brute(task, vectors(other, data), data)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    expected.backward()
    exact = [p.grad if p.grad is not None else torch.zeros_like(p) for p in other.parameters()]
    torch.testing.assert_close(grads, exact, rtol=1e-8, atol=1e-11)
    assert max(float(g.abs().max()) for g in grads) > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("words", LOSSES, ids=IDS)
def test_microbatches_change_nothing(words: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    task, data = Embedding(**words), batch()
    loss, grads = learned(task, model(task, dtype), data, N)
    for rows in (1, 2, 4):
        again, others = learned(task, model(task, dtype), data, rows)
        torch.testing.assert_close(again, loss, rtol=tolerance, atol=0)
        same(others, grads, tolerance)


def test_few_similarities_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = Embedding(matryoshka=(4, 8)), batch()
    whole = learned(task, model(task), data, 4)
    monkeypatch.setattr(embedding_loss, "LARGEST", 40)
    torch.testing.assert_close(learned(task, model(task), data, 4), whole, rtol=1e-10, atol=1e-13)


def test_what_drops_out_drops_out_again() -> None:
    """With dropout the second pass of a microbatch has to be the first one again: the gradient of the very loss that is
    told."""
    task, data = Embedding(), batch()
    it = model(task, dropout=0.3)
    loss, grads = learned(task, it, data, 2)
    step = 1e-8
    moved = []
    for sign in (1, -1):
        other = model(task, dropout=0.3)
        with torch.no_grad():
            for p, g in zip(other.parameters(), grads, strict=True):
                p += sign * step * g
        moved.append(float(learned(task, other, data, 2)[0]))
    slope = (moved[0] - moved[1]) / (2 * step)
    assert slope == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-5)
    assert float(loss) != float(learned(task, model(task), data, 2)[0])


def test_a_learned_temperature_begins_where_it_is_told_and_moves() -> None:
    fixed, free = Embedding(temperature=0.1), Embedding(temperature=0.1, learn_temperature=True)
    loss, _ = learned(fixed, model(fixed), batch(), N)
    it = model(free)
    again, grads = learned(free, it, batch(), N)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)  # ln 10 is kept in float32
    assert dict(zip((n for n, _ in it.named_parameters()), grads, strict=True))["log_scale"].abs() > 1e-4


@pytest.mark.parametrize(
    ("words", "missing", "said"),
    [
        ({"loss": "cosent"}, "scores", "data.score"),
        ({"loss": "distill"}, "teacher", "data.teacher"),
        ({"loss": "triplet"}, None, "third column"),
    ],
)
def test_what_a_loss_lacks_is_said(words: dict[str, Any], missing: str | None, said: str) -> None:
    task, data = Embedding(**words), batch(texts=2)
    if missing:
        del data[missing]
    with pytest.raises(UserError, match=said):
        task.backward(model(task), data, microbatch=2, ranks=ALONE)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="wider"):
        model(Embedding(matryoshka=(9,)))
    with pytest.raises(ValueError, match="odd"):
        model(Embedding(loss="angle", matryoshka=(5,)))
    with pytest.raises(ValueError, match="learn_temperature"):
        Embedding(loss="cosent", learn_temperature=True)
    with pytest.raises(ValueError, match="matryoshka"):
        Embedding(loss="distill", matryoshka=(4,))


def test_evaluation_is_of_whole_rows_and_leaves_all_as_it_was() -> None:
    task, data = Embedding(), batch(texts=2)
    it = model(task, dropout=0.5)
    state = torch.get_rng_state()
    unscored = {k: v for k, v in data.items() if k not in ("scores", "teacher")}
    scored = {k: v for k, v in data.items() if k != "teacher"}
    scored["ids"] = torch.tensor([0, 1, 2, 3, -1, -1])  # the last two are empty rows
    found = task.evaluate(it, [scored, unscored], ranks=ALONE, stop=lambda: False, microbatch=4)
    assert found is not None
    assert torch.equal(state, torch.get_rng_state())
    assert it.training
    v = vectors(it.eval(), data).detach()
    similar = F.cosine_similarity(v[:4, 0], v[:4, 1], dim=-1)
    expected = torch.corrcoef(torch.stack([similar, data["scores"][:4].double()]))[0, 1]
    assert found["val_pearson"] == pytest.approx(100 * float(expected), rel=1e-6)
    assert found["val_loss"] == pytest.approx(float(brute(task, v, unscored)), rel=1e-9)
    assert found["val_alignment"] == pytest.approx(float((v[:, 0] - v[:, 1]).square().sum(-1).mean()), rel=1e-9)
    pairs = [(a, b) for i, a in enumerate(v.flatten(0, 1)) for b in v.flatten(0, 1)[i + 1 :]]
    mean = sum(math.exp(-2 * float((a - b).square().sum())) for a, b in pairs) / len(pairs)
    assert found["val_uniformity"] == pytest.approx(math.log(mean), rel=1e-9)
    assert task.evaluate(it, [scored], ranks=ALONE, stop=lambda: True) is None
