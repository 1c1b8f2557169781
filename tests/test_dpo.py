"""Preferences: the loss is the paper's formula, over microbatches the same, and the first model is what it is compared with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import SMALL
from tests.hf_models import folder, made
from trainkit import build
from trainkit import run as runs
from trainkit.data.preferences import Preferences
from trainkit.errors import UserError


def pairs(place: Path) -> Path:
    lines = [{"prompt": f"Say {i}", "chosen": f"yes {i} " * (1 + i % 3), "rejected": f"no {i}"} for i in range(12)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place / "pairs.jsonl"


def tuned(place: Path, *overrides: str, kind: str = "llama") -> Any:
    folder(kind, place)
    small = [word for word in SMALL if not word.startswith(("model.", "data"))]
    words = ["model=hf", f"model.name={place / kind}", "model.adapter=lora", "task=dpo", "data=preferences"]
    words += [f"data.path={pairs(place)}", "data.length=48", "data.batch=4", "data.validation=0.2", "name=t"]
    run = runs.composed([*small, *words, *overrides])
    with build.trainer(run, Path("runs/t")) as trainer:
        return trainer


def stirred(learner: Any) -> Any:
    """A learner whose adapter says something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1)
    return learner


def said(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's labels, from whole logits."""
    logits = model(tokens)
    logits = getattr(logits, "logits", logits).log_softmax(-1)
    valid = labels != -100
    return (logits.gather(2, labels.clamp(min=0)[..., None])[..., 0] * valid).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_papers(smoothing: float, place: Path) -> None:
    learner = stirred(tuned(place, "task.beta=0.3", f"task.smoothing={smoothing}").learner)
    batch, first = learner.batch(), made("llama")
    chosen, rejected = (
        said(learner.model, batch[f"{side}tokens"], batch[f"{side}labels"])
        - said(first, batch[f"{side}tokens"], batch[f"{side}labels"])
        for side in ("", "rejected_")
    )
    margins = 0.3 * (chosen - rejected)
    expected = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    found = learner.task.backward(learner.model, batch, microbatch=4, ranks=learner.ranks)["loss"]
    torch.testing.assert_close(found, expected.mean().detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, torch.tensor(0.6931), atol=1e-3)
    learned = [p for p in learner.model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.mean(), learned)
    torch.testing.assert_close([p.grad for p in learned], list(wanted), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
def test_microbatches_change_nothing(kind: str, place: Path) -> None:
    learner = stirred(tuned(place, "model.adapter.dropout=0", kind=kind).learner)
    found = []
    for rows in (4, 1, 3):
        learner.model.zero_grad()
        loss = learner.task.backward(learner.model, learner.batch(), microbatch=rows, ranks=learner.ranks)["loss"]
        found.append([loss, *(p.grad.clone() for p in learner.model.parameters() if p.grad is not None)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_at_first_nothing_is_preferred_and_then_the_chosen_is(place: Path) -> None:
    trainer = tuned(place, "optimizer.lr=0.01", "steps=12")
    learner = trainer.learner
    before = learner.evaluate(learner.loader.validation(), lambda: False)
    assert before["val_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert before["val_margin"] == pytest.approx(0, abs=1e-5)
    for _ in range(12):
        learner.train_step()
    after = learner.evaluate(learner.loader.validation(), lambda: False)
    assert after["val_loss"] < 0.6
    assert after["val_accuracy"] == 1
    assert after["val_margin"] > 0.1


def test_only_the_answer_is_compared(place: Path) -> None:
    learner = tuned(place).learner
    rows = learner.loader._train
    batch = rows.batch(torch.arange(rows.sizes[0]).numpy())
    for side, word in (("", "yes"), ("rejected_", "no")):
        for row in batch[f"{side}labels"]:
            kept = [i for i in row.tolist() if i not in (-100, 257)]
            text = learner.loader._train and bytes_of(place, kept)
            assert text.startswith(word)
            assert "Say" not in text


def bytes_of(place: Path, ids: list[int]) -> str:
    cfg = runs.read(Path("runs/t"))
    assert cfg is not None
    tokenizer: Any = cfg.data.tokenizer.build(list)  # type: ignore[union-attr]
    text: str = tokenizer.decode(ids)
    return text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"chosen": "a", "rejected": "b"}', "is no pair"),
        ('{"prompt": "a", "chosen": "b"}', "is no pair"),
        ("{", "not JSON"),
    ],
)
def test_what_is_no_pair(line: str, message: str, place: Path) -> None:
    (place / "bad.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        Preferences(path=str(place / "bad.jsonl"), length=8, batch=1).open()


def test_what_does_not_go_together() -> None:
    with pytest.raises(UserError, match="only an adapter leaves as it was: add model.adapter=lora"):
        runs.composed(["task=dpo", "data=preferences", "data.path=x", "data.length=32"])
    with pytest.raises(UserError, match="task=dpo learns from preferences, and data=text has text"):
        runs.composed(["task=dpo"])
