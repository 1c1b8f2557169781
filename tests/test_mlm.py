"""Masked language modelling: what is hidden, and that neither microbatches nor ranks change it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_causal_lm import ALONE, ragged
from tests.test_embedding import same
from tests.test_models import model as causal_model
from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.models.attention import AttentionMixer
from trainkit.tasks import MaskedLM
from trainkit.tasks.mlm import drawn


def model(**shape: Any) -> torch.nn.Module:
    it = causal_model(**shape)
    it.backbone.cfg.attention.__dict__["causal"] = False  # type: ignore[union-attr]  # the same weights, looking both ways
    for module in it.modules():
        if isinstance(module, AttentionMixer):
            module.causal = False
    return it


def batch(rows: int = 6) -> dict[str, Tensor]:
    return {**ragged(rows), "ids": torch.arange(rows) * 7}


def test_so_many_are_hidden_and_nothing_else_changes() -> None:
    it, rows = model(), 400
    tokens = torch.randint(0, 30, (rows, 64))
    labels = torch.roll(tokens, -1, 1)
    labels[:, 5] = -100
    data = {"tokens": tokens, "labels": labels, "ids": torch.arange(rows)}
    last = it.backbone.embed.num_embeddings - 1  # type: ignore[union-attr, operator]
    found = MaskedLM(share=0.3).hidden(it, data, torch.tensor(5))
    guessed = found["labels"] != -100
    assert not guessed[:, 5].any()
    assert torch.equal(found["labels"][guessed], tokens[guessed])
    assert torch.equal(found["tokens"][~guessed], tokens[~guessed])
    assert float(guessed.double().mean()) == pytest.approx(0.3 * 63 / 64, abs=0.01)
    now = found["tokens"][guessed]
    assert float((now == last).double().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((now == tokens[guessed]).double().mean()) == pytest.approx(0.1 + 0.1 / last, abs=0.02)
    again = MaskedLM(share=0.3).hidden(it, data, torch.tensor(6))
    assert not torch.equal(again["labels"], found["labels"])
    part = {k: v[100:200] for k, v in data.items()}
    assert torch.equal(MaskedLM(share=0.3).hidden(it, part, torch.tensor(5))["tokens"], found["tokens"][100:200])


def test_what_is_drawn_is_even_and_unrelated() -> None:
    ids = torch.arange(2000)
    first, second = (drawn(torch.tensor(9), ids, 32, lane) for lane in (0, 1))
    counts = torch.histc(first, 20, 0, 1)
    assert float(((counts - 3200) ** 2 / 3200).sum()) < 45  # chi-squared of 19 degrees, p = 0.0007
    both = torch.stack(
        [first.flatten(), second.flatten(), torch.roll(first, 1, 0).flatten(), torch.roll(first, 1, 1).flatten()]
    )
    assert float((torch.corrcoef(both) - torch.eye(4)).abs().max()) < 0.02


def test_the_loss_is_the_mean_over_hidden_tokens_of_all_ranks() -> None:
    task, data = MaskedLM(share=0.5), batch()
    grads, losses = [], []
    for rows in (6, 1, 4):
        it = model()
        torch.manual_seed(3)
        losses.append(task.backward(it, data, microbatch=rows, ranks=ALONE)["loss"])
        grads.append([p.grad for p in it.parameters()])
    same(grads[1], grads[0], 1e-9)
    same(grads[2], grads[0], 1e-9)
    it = model()
    torch.manual_seed(3)
    hidden = task.hidden(it, data, torch.randint(1 << 62, ()))
    logits = it(hidden["tokens"], None, data["documents"]).flatten(0, 1)
    mean = F.cross_entropy(logits, hidden["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(torch.stack(losses), mean.detach().expand(3), rtol=1e-6, atol=0)
    summed = [torch.zeros_like(g) for g in grads[0]]
    count = (hidden["labels"] != -100).sum()
    torch.manual_seed(3)
    key = torch.randint(1 << 62, ())
    for rank in (0, 1):
        it = model()
        words = iter([lambda t, r=rank: t + key * r, lambda t: count])  # the first rank's word, and how many are hidden

        def total(t: Tensor, words: Any = words) -> Tensor:
            return next(words)(t) if t.dtype == torch.int64 else t

        summed_by = SimpleNamespace(**{**vars(ALONE), "rank": rank, "sum": total})
        part = {k: v[3 * rank : 3 * rank + 3] for k, v in data.items()}
        torch.manual_seed(3 + rank)
        task.backward(it, part, microbatch=2, ranks=summed_by)
        summed = [s + p.grad for s, p in zip(summed, it.parameters(), strict=True)]
    same(summed, grads[0], 1e-9)


def test_an_evaluation_hides_the_same_each_time() -> None:
    it, task = model(), MaskedLM(share=0.5)
    one, two = (task.evaluate(it, [batch()], ranks=ALONE, stop=lambda: False, microbatch=m) for m in (None, 4))
    assert one is not None
    assert one == pytest.approx(two, rel=1e-9)
    assert set(one) == set(task.metrics)


def test_an_encoder_learns_from_text(trained: Any) -> None:
    words = ["task=mlm", "model.attention.causal=false", "evaluation.every=30", "optimizer.lr=0.01", "data.batch=8"]
    trainer = trained(*words, "steps=60", "tracking.every=30")
    first = trainer.best.value
    assert first < 5.0
    with pytest.raises(UserError, match="model.attention.causal=false"):
        runs.composed(["task=mlm"])
    with pytest.raises(UserError, match="has 258 ids and model.vocab=257"):
        build.check(runs.composed([*words, "model.vocab=257"]))
