"""Predict the next token. The loss is a sum over tokens, divided once by their global number.

B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.config import config
from trainkit.tasks.loss import IGNORED, summed_loss


class NextToken:
    """What every task does whose loss is a sum over tokens that were to be predicted."""

    metrics: ClassVar[tuple[str, ...]] = ("val_loss", "val_perplexity", "val_bits_per_byte")
    takes: ClassVar[str] = "text"  # of what `data` gives
    head: ClassVar[bool] = True  # whether the backbone's head is used
    writes: ClassVar[bool] = True  # whether its model can go on from a text
    own_ids: ClassVar[int] = 0  # of the model's, which no text may have
    kind: str

    def check(self, model: Any) -> None:
        """Raise ValueError where a model of this config cannot do it."""
        if not model.attention.causal:
            raise ValueError(
                f"task={self.kind} guesses what follows, which model.attention.causal=false shows: use task=mlm"
            )

    def measured(self, data: Any) -> tuple[str, ...]:
        """The metrics that `data` holds something out for."""
        return self.metrics

    def build(self, backbone: nn.Module) -> nn.Module:
        """The model whose forward this task calls."""
        return LanguageModel(backbone)

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
        """Add the gradient of the global batch's mean loss to the parameters, `microbatch` rows at a time. With `exact`
        sums it is row by row, and the same to the bit however many ranks share the batch.

        Returns:
            `loss`: that mean, in nats a token, a detached scalar. A batch without labels has loss and gradient 0.
            `own_loss`: what this rank's rows have added to it.
        """
        count = ranks.sum((batch["labels"] != IGNORED).sum()).clamp(min=1)
        if (pipeline := getattr(model, "pipeline", None)) is not None:
            ranks.sum_next(model, last=False)
            loss = pipeline.backward(batch, microbatch, lambda loss: scale(loss / count)) / count
            ranks.pace.forward_done()
            ranks.finish_sums()
            return {"loss": ranks.sum(loss), "own_loss": loss}
        parts = list(microbatches(batch, 1 if exact else microbatch))
        losses = (model(part["tokens"], part["labels"], part.get("documents")) / count for part in parts)
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
        """Loss (nats a token), perplexity and bits per byte of the batches, `microbatch` rows at a time (None: a whole
        batch); None when `stop()` says so in between.

        Without a single label there is nothing to measure: all are NaN.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        with evaluating(model):
            for batch in batches:
                if stop():
                    return None
                for rows in microbatches(batch, microbatch or len(batch["tokens"])):
                    loss = model(rows["tokens"], rows["labels"], rows.get("documents"))
                    sums += torch.stack([loss.double(), (rows["labels"] != IGNORED).sum(), rows["bytes"].sum()])
        nats, tokens, size = ranks.sum(sums).tolist()
        loss_per_token = nats / tokens if tokens else math.nan
        return {
            "val_loss": loss_per_token,
            "val_perplexity": math.exp(min(loss_per_token, 700)),
            "val_bits_per_byte": nats / math.log(2) / size if size else math.nan,
        }


@config
class CausalLM(NextToken):
    """Next-token prediction (Radford et al. 2018)."""

    kind: Literal["causal_lm"] = "causal_lm"


class LanguageModel(nn.Module):
    """`forward(tokens_BT, labels_BT, documents_BT=None)` is the sum of the losses; without labels it is the logits BTV.

    With `caches`, one a block, the rows go on from the `seen` positions in them, and only the last position's logits
    B1V are made: a step of generation. `fused_loss` says whether the loss is made in chunks.
    """

    fused_loss: Literal["auto", "on", "off"] = "auto"
    vocabulary: Any = None  # ranks that each have a part of the head (trainkit/parallel/tensor.py)
    positions: Any = None  # ranks that each have a part of the positions (trainkit/parallel/context.py)
    pipeline: Any = None  # ranks that each have some of the layers (trainkit/parallel/pipeline.py)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        caches: Sequence[Any] | None = None,
        seen: int = 0,
    ) -> Tensor:
        if self.pipeline is not None:
            return self.pipeline.forward(tokens, labels, documents, caches, seen)
        if caches is not None:
            return self.logits(self.backbone(tokens, documents, caches=caches, seen=seen)[:, -1:])
        if labels is None:
            if self.positions is not None:
                self.positions.whole()
            return self.logits(self.backbone(tokens, documents))
        if self.positions is None:
            return self.loss(self.backbone(tokens, documents), labels)
        part = self.positions.part(tokens.shape[1])
        return self.positions.sum(self.loss(self.backbone(tokens, documents, part=part), labels[:, part]))

    def logits(self, hidden: Tensor) -> Tensor:
        """BTV, of hidden states as the backbone gives them."""
        if self.vocabulary is None:
            return F.linear(hidden, self.backbone.unembed)  # type: ignore[arg-type]  # a backbone's (V, D) head
        part = F.linear(self.vocabulary.hidden(hidden), self.backbone.unembed)  # type: ignore[arg-type]
        return self.vocabulary.logits(part)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses, of hidden states as the backbone gives them."""
        if self.vocabulary is not None:
            hidden = self.vocabulary.hidden(hidden)
        return summed_loss(hidden, self.backbone.unembed, labels, self.fused_loss, self.vocabulary)  # type: ignore[arg-type]


def accumulated(
    model: nn.Module,
    losses: Iterable[Tensor],
    count: int,
    *,
    ranks: Any,
    scale: Callable[[Tensor], Tensor],
    exact: Any,
) -> dict[str, Any]:
    """Add the gradients of `count` microbatches' losses to the parameters. Each loss is made when it is asked for, and adds up
    with the others, on all ranks, to that of the global batch: `loss`; `own_loss` is this rank's part of it."""
    total = torch.zeros((), device=ranks.device)
    asked = iter(losses)
    for number in range(count):
        if exact:
            exact.begin_row(number)
        ranks.sum_next(model, last=number == count - 1)
        loss = next(asked)
        ranks.pace.forward_done()
        scale(loss).backward()
        if exact:
            exact.take(loss.detach())
        total = total + loss.detach()
    ranks.finish_sums()
    return {"loss": exact.finish() if exact else ranks.sum(total), "own_loss": total}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` drops nothing meanwhile; afterwards it is as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def microbatches(batch: Mapping[str, Tensor], rows: int) -> Iterable[dict[str, Tensor]]:
    """A batch, so many rows at a time."""
    for begin in range(0, len(batch["tokens"]), rows):
        yield {name: tensor[begin : begin + rows] for name, tensor in batch.items()}
