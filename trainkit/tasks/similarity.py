"""How good vectors are: correlations with people's scores, retrieval, and where on the sphere they lie."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.tasks.embedding_loss import cosines

AT_ONCE = 1024  # queries compared with all documents
MOST = 4096  # vectors of which uniformity takes all pairs


class Found:
    """What an evaluation has seen so far, batch by batch. Its vectors stay on the host."""

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, int]] = []
        self._scored: list[tuple[Tensor, Tensor]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Any, loss: Tensor | None) -> None:
        """Take in a batch's rows, and the mean loss of them if it has one."""
        if loss is not None:
            self._losses.append((loss, len(rows.vectors)))
        if rows.texts.shape[1] < 2:
            return
        if rows.scores is not None:
            self._scored.append((cosines(rows).cpu(), rows.scores.cpu()))
        else:
            self._pairs.append((F.normalize(rows.vectors[:, :2], dim=-1).cpu(), rows.texts[:, :2].cpu()))

    def metrics(self) -> dict[str, float]:
        """All that could be measured."""
        found: dict[str, float] = {}
        if self._losses:
            count = sum(n for _, n in self._losses)
            found["val_loss"] = sum(float(loss) * n for loss, n in self._losses) / count
        if self._scored:
            similar, scores = (torch.cat(parts) for parts in zip(*self._scored, strict=True))
            found["val_spearman"] = 100 * spearman(similar, scores)
            found["val_pearson"] = 100 * pearson(similar, scores)
        if self._pairs:
            vectors, texts = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
            found |= {f"val_{name}": value for name, value in retrieval(vectors, texts).items()}
            found["val_alignment"] = float((vectors[:, 0] - vectors[:, 1]).double().square().sum(-1).mean())
            found["val_uniformity"] = uniformity(vectors.flatten(0, 1))
        return found


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else math.nan


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's: Pearson's of the ranks, where equal values share the mean of theirs."""
    return pearson(ranked(x), ranked(y))


def ranked(x: Tensor) -> Tensor:
    """(N,) float64 ranks from 1; equal values have the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def retrieval(vectors: Tensor, texts: Tensor) -> dict[str, float]:
    """How well each different anchor finds its positives among all different positives, by cosine. `vectors` (N, 2, K)
    of length 1, `texts` (N, 2) their numbers. Equal similarities count against it.

    nDCG@10 of binary relevance (Järvelin & Kekäläinen 2002), mean reciprocal rank of the first positive, and the share
    of the positives among the first 1 and 10 (of so many at most).
    """
    anchors, query = torch.unique(texts[:, 0], return_inverse=True)
    positives, document = torch.unique(texts[:, 1], return_inverse=True)
    first = [torch.empty(len(names), vectors.shape[-1], dtype=vectors.dtype) for names in (anchors, positives)]
    first[0][query], first[1][document] = vectors[:, 0], vectors[:, 1]
    pairs = torch.unique(torch.stack([query, document], 1), dim=0)
    sums = dict.fromkeys(("ndcg10", "mrr", "recall1", "recall10"), 0.0)
    for begin in range(0, len(anchors), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        similar = first[0][some] @ first[1].T
        relevant = torch.zeros_like(similar, dtype=torch.bool)
        mine = pairs[(pairs[:, 0] >= begin) & (pairs[:, 0] < begin + AT_ONCE)]
        relevant[mine[:, 0] - begin, mine[:, 1]] = True
        for name, value in _ranking(similar, relevant).items():
            sums[name] += value
    return {name: value / len(anchors) for name, value in sums.items()}


def _ranking(similar: Tensor, relevant: Tensor) -> dict[str, float]:
    """The sums over queries of what `retrieval` says."""
    by_place = similar.double() - relevant * 1e-12  # of equals the relevant one comes last
    hits = relevant.gather(1, by_place.argsort(descending=True, dim=1, stable=True)).double()
    counts = relevant.sum(1).double()
    discounts = 1 / torch.arange(2, 12).double().log2()
    top = hits[:, :10]
    best = torch.stack([discounts[: min(10, int(n))].sum() for n in counts])
    ndcg = (top * discounts[: top.shape[1]]).sum(1) / best
    reciprocal = 1 / (hits.argmax(1) + 1).double()
    recall = {f"recall{k}": hits[:, :k].sum(1) / counts.clamp(max=k) for k in (1, 10)}
    every = {"ndcg10": ndcg, "mrr": reciprocal, **recall}
    return {name: float(value.sum()) for name, value in every.items()}


def uniformity(vectors: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|²) over all pairs of `vectors` (N, K) of length 1, of the first 4096."""
    distances = torch.pdist(vectors[:MOST].double()).square()
    return float((-2 * distances).exp().mean().log()) if len(distances) else math.nan
