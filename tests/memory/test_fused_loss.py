"""The loss in chunks or from whole logits: the same loss, another amount of memory."""

from collections.abc import Callable

import pytest
import torch

from tests.memory.allocated import most_allocated
from tests.test_models import decoder, tokens
from trainkit import run as runs
from trainkit.learner import Learner
from trainkit.memory import Memory
from trainkit.tasks import CausalLM, loss
from trainkit.tasks.loss import summed_loss


def operands(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=draw, requires_grad=True)
    unembed = torch.randn(vocab, 16, generator=draw, requires_grad=True)
    return hidden, unembed, torch.randint(0, vocab, (rows,), generator=draw)


def test_whole_logits_are_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 1 << 16)
    rows, vocab = 2048, 4096
    h, w, y = operands(rows, vocab)
    logits = 4 * rows * vocab
    took = {how: most_allocated(lambda how=how: summed_loss(h, w, y, how).backward()) for how in ("on", "off", "auto")}  # type: ignore[arg-type]
    assert took["off"] >= 2 * logits
    assert took["on"] < logits / 8
    assert took["auto"] == took["on"]  # above the size
    monkeypatch.setattr(loss, "WHOLE", rows * vocab)
    assert most_allocated(lambda: summed_loss(h, w, y).backward()) >= 2 * logits


@pytest.mark.parametrize("fused", ["auto", "on", "off"])
def test_the_model_does_what_is_chosen(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WHOLE", 0 if fused == "off" else 1 << 40)
    it = Memory(fused_loss=fused).apply(CausalLM().build(decoder().build()))  # type: ignore[arg-type]
    seen = it(tokens(), tokens()).grad_fn.name()
    assert ("ChunkedLoss" in seen) == (fused == "on")


def test_baseline_is_whole_logits_and_the_default_is_not(learner: Callable[..., Learner]) -> None:
    assert runs.composed([]).memory.fused_loss == "auto"
    assert runs.composed(["memory=baseline"]).memory.fused_loss == "off"
    assert runs.composed(["memory=checkpoint"]).memory.fused_loss == "auto"
    for words in ("baseline+fused_loss", "fused_loss+baseline", "[fused_loss,baseline]"):
        assert runs.composed([f"memory={words}"]).memory.fused_loss == "on"
    assert runs.composed(["memory=fused_loss"]).memory.describe() == "fused_loss (reordered)"
    assert runs.composed(["memory=baseline"]).memory.describe() == "baseline"
    assert runs.composed([]).memory.describe() == "fused_loss where logits are large (reordered)"
