"""Learn which of two answers is preferred: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

B pairs, T positions, D model width, V vocabulary. The loss is a sum over pairs, divided once by their global number, so that it
is the same however a batch is split.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.config import Fraction, Positive, config
from trainkit.models.adapters import asleep
from trainkit.tasks.causal_lm import CausalLM, LanguageModel, accumulated, evaluating, microbatches
from trainkit.tasks.loss import IGNORED, summed_loss

METRICS = ("val_loss", "val_accuracy", "val_margin")


@config
class DPO:
    """`beta` is how dear it is to leave the model that the run began with. That is the model without its adapter, so that there
    is nothing to hold twice. `smoothing` is how often a preference is taken to be the other way round."""

    metrics: ClassVar[tuple[str, ...]] = METRICS
    takes: ClassVar[str] = "preferences"
    head: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    own_ids: ClassVar[int] = 0
    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    smoothing: Fraction = 0.0

    def check(self, model: Any) -> None:
        """Raise ValueError where a model of this config cannot do it."""
        CausalLM().check(model)
        if model.adapter is None:
            raise ValueError(
                "task=dpo compares with the model that the run began with, which only an adapter leaves as it was: add "
                "model.adapter=lora"
            )

    def measured(self, data: Any) -> tuple[str, ...]:
        """The metrics that `data` holds something out for."""
        return self.metrics

    def build(self, backbone: nn.Module) -> nn.Module:
        """The model whose forward this task calls."""
        return PreferenceModel(backbone, self.beta, self.smoothing)

    def backward(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        *,
        microbatch: int,
        ranks: Any,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        exact: Any = None,
    ) -> dict[str, Any]:
        """Add the gradient of the global batch's mean loss a pair to the parameters: what it takes and gives is what
        `CausalLM.backward` does."""
        count = ranks.sum((batch["labels"] != IGNORED).any(1).sum()).clamp(min=1)
        parts = list(microbatches(batch, 1 if exact else microbatch))
        losses = (_compared(model, part)[0] / count for part in parts)
        return accumulated(model, losses, len(parts), ranks=ranks, scale=scale, exact=exact)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        ranks: Any,
        stop: Callable[[], bool],
        microbatch: int | None = None,
    ) -> dict[str, float] | None:
        """Loss a pair, the share of pairs whose preferred answer has gained more, and by how much (times beta, in nats); None
        when `stop()` says so in between."""
        sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        with evaluating(model):
            for batch in batches:
                if stop():
                    return None
                for rows in microbatches(batch, microbatch or len(batch["tokens"])):
                    count = (rows["labels"] != IGNORED).any(1).sum()
                    sums += torch.cat([_compared(model, rows).double(), count.double()[None]])
        *found, pairs = ranks.sum(sums).tolist()
        return {name: value / pairs if pairs else float("nan") for name, value in zip(METRICS, found, strict=True)}


class PreferenceModel(LanguageModel):
    """`forward(tokens_BT, labels_BT, rejected_tokens=, rejected_labels=)` is (3,): the sums over the pairs of the losses, of
    those that are told apart, and of the margins. Without labels it is a language model."""

    def __init__(self, backbone: nn.Module, beta: float, smoothing: float) -> None:
        super().__init__(backbone)
        self.beta, self.smoothing = beta, smoothing

    def forward(self, tokens: Tensor, labels: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
        if "rejected_tokens" not in more:
            return super().forward(tokens, labels, *rest, **more)
        assert labels is not None
        both = torch.cat([tokens, more["rejected_tokens"]])
        targets = torch.cat([labels, more["rejected_labels"]])
        gained = self._said(both, targets) - self._before(both, targets)
        chosen, rejected = gained.chunk(2)
        valid = (labels != IGNORED).any(1)
        margins = self.beta * (chosen - rejected)
        losses = -(1 - self.smoothing) * F.logsigmoid(margins) - self.smoothing * F.logsigmoid(-margins)
        return torch.stack([(part * valid).sum() for part in (losses, (margins > 0).to(losses), margins)])

    def _said(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(rows,) the log-probability of each row's labels."""
        hidden, unembed = self.backbone(tokens), self.backbone.unembed
        rows = zip(hidden, labels, strict=True)
        return -torch.stack([summed_loss(row, unembed, own, self.fused_loss) for row, own in rows])  # type: ignore[arg-type]

    @torch.no_grad()
    def _before(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The same of the model that the run began with, nothing dropped."""
        with evaluating(self.backbone), asleep(self.backbone):
            return self._said(tokens, labels)


def _compared(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(
        rows["tokens"],
        rows["labels"],
        rejected_tokens=rows["rejected_tokens"],
        rejected_labels=rows["rejected_labels"],
    )
    return found
