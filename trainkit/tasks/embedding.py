"""One vector a text, near those of the texts that it belongs to.

A loss over pairs of a whole batch does not add up over its microbatches, so its gradient is made in three moves, which
are exact: vectors of all rows without a graph, the gradient of the loss by the vectors, and that gradient pushed
through the model a microbatch at a time (GradCache; Gao et al. 2021, arXiv:2101.06983). What drops out in a microbatch
does so twice: each is seeded. B a rank's rows, N those of all ranks, P texts a row, K vector width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainkit.config import Count, NonNegative, Positive, config
from trainkit.errors import UserError
from trainkit.tasks import embedding_loss as losses
from trainkit.tasks.causal_lm import evaluating
from trainkit.tasks.embedding_loss import Rows, truncated
from trainkit.tasks.embedding_model import EmbeddingModel, Pooling
from trainkit.tasks.passes import Passes, gathered, places
from trainkit.tasks.similarity import Found

OF_SCORES = ("cosent", "angle")
OF_PEOPLE = ("val_spearman", "val_pearson")


@config
class Embedding:
    """`loss` is of `info_nce` (pairs, with hard negatives where there are some), `triplet`, `cosent` and `angle` (pairs
    with scores) and `distill` (a teacher's vectors). `projection` is a vector's width, null the model's. `matryoshka`
    are the widths at which the loss is taken as well, each with the same weight.

    `temperature` divides what info_nce compares and is learned from there if `learn_temperature`; `scale` multiplies
    what cosent and angle compare; `margin` is triplet's; `false_negatives`: what is more similar than the positive by
    more is no negative.
    """

    metrics: ClassVar[tuple[str, ...]] = (
        *("val_loss", "val_spearman", "val_pearson", "val_ndcg10", "val_mrr", "val_recall1", "val_recall10"),
        *("val_alignment", "val_uniformity"),
    )
    takes: ClassVar[str] = "pairs"
    head: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    own_ids: ClassVar[int] = 0
    kind: Literal["embedding"] = "embedding"
    loss: Literal["info_nce", "triplet", "cosent", "angle", "distill"] = "info_nce"
    pooling: Pooling = "mean"
    projection: Count | None = None
    matryoshka: tuple[Count, ...] = ()
    temperature: Positive = 0.05
    learn_temperature: bool = False
    symmetric: bool = True
    false_negatives: NonNegative | None = None
    scale: Positive = 20.0
    margin: NonNegative = 0.2

    def __post_init__(self) -> None:
        if self.learn_temperature and self.loss != "info_nce":
            raise ValueError(
                f"task.learn_temperature is of task.loss=info_nce: task.loss={self.loss} has none to learn"
            )
        if self.loss == "distill" and self.matryoshka:
            raise ValueError("task.loss=distill compares whole vectors with a teacher's: task.matryoshka must go")

    def check(self, model: Any) -> None:
        """Raise ValueError where a model of this config has not the vectors for it."""
        width = self.projection or model.width
        if wide := [w for w in self.matryoshka if w > width]:
            raise ValueError(f"task.matryoshka={wide[0]} is wider than the vectors, which have {width} numbers")
        if self.loss == "angle" and (odd := [w for w in (width, *self.matryoshka) if w % 2]):
            raise ValueError(f"task.loss=angle takes halves of vectors, and {odd[0]} is odd")

    def measured(self, data: Any) -> tuple[str, ...]:
        """The metrics that `data` holds something out for."""
        loss = "scores" if self.loss in OF_SCORES else "pairs"
        needs = {name: "scores" if name in OF_PEOPLE else "pairs" for name in self.metrics} | {"val_loss": loss}
        return tuple(name for name in self.metrics if needs[name] in data.held_out)

    def build(self, backbone: nn.Module) -> nn.Module:
        """The model whose forward this task calls."""
        return EmbeddingModel(
            backbone, self.pooling, self.projection, 1 / self.temperature if self.learn_temperature else None
        )

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
        """Add the gradient of the global batch's loss to the parameters, `microbatch` rows at a time. A rank's rows
        that go through at once need one pass. With `exact` sums it is row by row, and the same to the bit however many
        ranks share the batch.

        Returns:
            `loss`: of the global batch, a detached scalar. `own_loss`: what this rank's rows have added to it.

        Raises:
            UserError: the rows have not what the loss compares.
        """
        self._refuse(batch)
        count = len(batch["lengths"])
        passes = Passes(model, batch, 1 if exact else min(microbatch, count), exact)
        kept = passes.once(graph=passes.whole)
        rows = gathered(ranks, kept.detach(), batch)
        here = slice(ranks.rank * count, (ranks.rank + 1) * count)
        if exact:  # every rank makes the whole gradient, so that no sum over ranks rounds
            loss, gradient = self.gradient(rows, slice(0, len(rows.vectors)))
            own = loss * (count / len(rows.vectors))
            passes.again(gradient[here], scale, ranks, loss / len(rows.vectors))
            return {"loss": exact.finish(), "own_loss": own}
        own, gradient = self.gradient(rows, here)
        passes.again(ranks.sum(gradient)[here], scale, ranks, None, kept)
        ranks.finish_sums()
        return {"loss": ranks.sum(own), "own_loss": own}

    @torch.enable_grad()
    def gradient(self, rows: Rows, part: slice) -> tuple[Tensor, Tensor]:
        """The part of the loss that the rows in `part` add, and its gradient (N, P, K) by all vectors. A loss that is
        not of rows is shared out by their number."""
        leaf = Rows(rows.vectors.clone().requires_grad_(), rows.texts, rows.scores, rows.teacher)
        total = torch.zeros((), device=leaf.vectors.device, dtype=leaf.vectors.dtype)
        for loss in self.parts(leaf, part):
            loss.backward()
            total += loss.detach()
        assert leaf.vectors.grad is not None
        return total, leaf.vectors.grad

    def value(self, rows: Rows) -> Tensor:
        """The loss of all `rows`."""
        return torch.stack(list(self.parts(rows, slice(0, len(rows.vectors))))).sum()

    def parts(self, rows: Rows, part: slice) -> Iterator[Tensor]:
        """The loss of the rows in `part`, in pieces that add up: of each width, and of few rows at a time."""
        widths = self.matryoshka or (rows.vectors.shape[-1],)
        each = 0 if self.loss in OF_SCORES else rows.texts.numel()
        for width in widths:
            for some in losses.parts(part.start, part.stop, each):
                narrow = Rows(truncated(rows.vectors, width), rows.texts, rows.scores, rows.teacher)
                yield self.of(narrow, some) / len(widths)

    def of(self, rows: Rows, part: slice) -> Tensor:
        """What the rows in `part` add to the loss of all `rows`."""
        match self.loss:
            case "info_nce":
                scale = 1.0 if self.learn_temperature else 1 / self.temperature
                return losses.info_nce(rows, part, scale=scale, symmetric=self.symmetric, hardness=self.false_negatives)
            case "triplet":
                return losses.triplet(rows, part, margin=self.margin)
            case "distill":
                return losses.distilled(rows, part)
        assert rows.scores is not None
        similar = losses.cosines(rows) if self.loss == "cosent" else losses.angles(rows)
        share = (part.stop - part.start) / len(rows.vectors)
        return losses.ordered(similar, rows.scores, self.scale) * share

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
        """The loss; of pairs with scores Spearman's and Pearson's correlation with the cosines, times 100; of pairs
        without how well an anchor finds its positives among all of the split: nDCG@10, mean reciprocal rank, recall@1
        and @10; alignment and uniformity (Wang & Isola 2020, arXiv:2005.10242). What nothing was measured of is NaN.
        None when `stop()` says so in between.
        """
        found = Found()
        with evaluating(model):
            for batch in batches:
                if stop():
                    return None
                rows = gathered(ranks, self.embed(model, batch, microbatch), batch)
                real = places(ranks, batch["ids"] + 1) > 0
                rows = Rows(
                    rows.vectors[real],
                    rows.texts[real],
                    None if rows.scores is None else rows.scores[real],
                    None if rows.teacher is None else rows.teacher[real],
                )
                found.add(rows, self.value(rows) if self._fits(rows) else None)
        return found.metrics()

    def embed(self, model: nn.Module, batch: Mapping[str, Tensor], microbatch: int | None = None) -> Tensor:
        """The vectors (B, P, K) of a batch, without a graph, `microbatch` rows at a time (None: all at once)."""
        count = len(batch["lengths"])
        return Passes(model, batch, min(microbatch or count, count), None).once(graph=False)

    def _fits(self, rows: Rows) -> bool:
        """Whether the loss can be taken of these rows."""
        if self.loss == "distill":
            return rows.teacher is not None
        if self.loss == "triplet":
            return rows.texts.shape[1] > 2
        return len(rows.vectors) > 0 and (rows.scores is not None) == (self.loss in OF_SCORES)

    def _refuse(self, batch: Mapping[str, Tensor]) -> None:
        """Raise UserError where the loss has nothing to compare in these rows."""
        texts = batch["lengths"].shape[1]
        for wrong, why in {
            f"task.loss={self.loss} compares scores, and these pairs have none: name their column, data.score=NAME": (
                self.loss in OF_SCORES and "scores" not in batch
            ),
            "task.loss=triplet compares a positive with hard negatives: name a third column in data.columns": (
                self.loss == "triplet" and texts < 3
            ),
            "task.loss=distill compares with a teacher's vectors: name their file, data.teacher=FILE.npy": (
                self.loss == "distill" and "teacher" not in batch
            ),
            f"task.loss={self.loss} compares pairs, and these rows have one text each": (
                self.loss != "distill" and texts < 2
            ),
        }.items():
            if why:
                raise UserError(wrong)
