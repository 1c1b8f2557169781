"""What vectors of a batch should be: near what they belong to, and far from the rest.

N rows of the global batch, P texts a row (anchor, positive, hard negatives), K vector width. A loss is given for some
of the rows and divided by N, so that the parts of all microbatches and ranks add up to that of the whole batch.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

MISSING = -1  # the number of a text that is not there
LARGEST = 1 << 24  # similarities made at once, 64 MiB in float32


@dataclass
class Rows:
    """A batch's `vectors` (N, P, K), the numbers of their `texts` (N, P), equal where a text is the same and -1 where
    there is none; `scores` (N,), `teacher` (N, P, K)."""

    vectors: Tensor
    texts: Tensor
    scores: Tensor | None = None
    teacher: Tensor | None = None


def info_nce(rows: Rows, part: slice, *, scale: float, symmetric: bool, hardness: float | None) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) of the rows in `part`, over N: each anchor is to find its
    positive among all positives and hard negatives of the batch; `symmetric`: and each positive its anchor (Radford et
    al. 2021, arXiv:2103.00020), the mean of both.

    What cannot be wrong is no candidate: another copy of the anchor or of its positive, a positive of another copy of
    the anchor. With `hardness` neither is what is more similar to the anchor than its positive is by more than that.
    """
    v, texts = rows.vectors, rows.texts
    anchors, positives = v[:, 0], v[:, 1]
    own = torch.arange(len(v), device=v.device)[part]
    candidates = v[:, 1:].transpose(0, 1).flatten(0, 1)  # (N * (P - 1), K), the positives first
    names = texts[:, 1:].T.flatten()
    a, p = texts[part, 0, None], texts[part, 1, None]
    banned = (names == a) | (names == p) | (names == MISSING)
    banned[:, : len(v)] |= texts[:, 0] == a
    loss = _nll(anchors[part], candidates, own, banned, scale, hardness)
    if not symmetric:
        return loss / len(v)
    banned = (texts[:, 0] == a) | (texts[:, 0] == p) | (texts[:, 1] == p)
    return (loss + _nll(positives[part], anchors, own, banned, scale, hardness)) / (2 * len(v))


def _nll(
    queries: Tensor, candidates: Tensor, right: Tensor, banned: Tensor, scale: float, hardness: float | None
) -> Tensor:
    """The sum over queries of -log softmax at the right candidate, which is never banned."""
    similar = queries @ candidates.T
    if hardness is not None:
        with torch.no_grad():
            size = queries.norm(dim=-1, keepdim=True) * candidates.norm(dim=-1)
            cosines = similar / size
            banned = banned | (cosines > cosines.gather(1, right[:, None]) + hardness)
    banned = banned.scatter(1, right[:, None], False)
    return F.cross_entropy((similar * scale).masked_fill(banned, -torch.inf), right, reduction="sum")


def triplet(rows: Rows, part: slice, *, margin: float) -> Tensor:
    """The triplet loss (Schroff et al. 2015, arXiv:1503.03832) of the rows in `part`, over N: the mean over a row's
    hard negatives of max(0, margin + |anchor - positive|² - |anchor - negative|²), vectors of length 1."""
    v = F.normalize(rows.vectors[part], dim=-1)
    there = (rows.texts[part, 2:] != MISSING).to(v.dtype)
    near = (v[:, 0] - v[:, 1]).square().sum(-1, keepdim=True)
    far = (v[:, :1] - v[:, 2:]).square().sum(-1)
    each = F.relu(margin + near - far) * there
    return (each.sum(1) / there.sum(1).clamp(min=1)).sum() / len(rows.vectors)


def distilled(rows: Rows, part: slice) -> Tensor:
    """The squared distance to a teacher's vectors of the same texts (Reimers & Gurevych 2020, arXiv:2004.09813), both
    of length 1: the mean over a row's texts, summed over the rows in `part`, over N."""
    assert rows.teacher is not None
    v, t = F.normalize(rows.vectors[part], dim=-1), F.normalize(rows.teacher[part].to(rows.vectors.dtype), dim=-1)
    there = (rows.texts[part] != MISSING).to(v.dtype)
    each = (v - t).square().sum(-1) * there
    return (each.sum(1) / there.sum(1).clamp(min=1)).sum() / len(rows.vectors)


def ordered(similar: Tensor, scores: Tensor, scale: float) -> Tensor:
    """CoSENT (Su 2022, https://kexue.fm/archives/8847): log(1 + the sum of exp(scale (similar_j - similar_i)) over all
    i, j with score_i > score_j). `similar` and `scores` are (N,)."""
    higher = scores[:, None] > scores[None, :]
    wrong = ((similar[None, :] - similar[:, None]) * scale).masked_fill(~higher, -torch.inf)
    return torch.cat([wrong.new_zeros(1), wrong.flatten()]).logsumexp(0)


def cosines(rows: Rows) -> Tensor:
    """(N,) of anchor and positive."""
    return F.cosine_similarity(rows.vectors[:, 0], rows.vectors[:, 1], dim=-1)


def angles(rows: Rows) -> Tensor:
    """(N,) AnglE's similarity of anchor and positive (Li & Li 2023, arXiv:2309.12871): the halves of a vector are real
    and imaginary parts, and what counts is the quotient of the two complex vectors, where a cosine is flat."""
    (a, b), (c, d) = (F.normalize(rows.vectors[:, i], dim=-1).chunk(2, -1) for i in (0, 1))
    real, imaginary = (a * c + b * d).sum(-1), (b * c - a * d).sum(-1)
    return (real + imaginary).abs()


def truncated(vectors: Tensor, width: int) -> Tensor:
    """The first `width` numbers of each vector, made as long as it was (Kusupati et al. 2022, arXiv:2205.13147)."""
    if width == vectors.shape[-1]:
        return vectors
    return F.normalize(vectors[..., :width], dim=-1) * vectors.norm(dim=-1, keepdim=True)


def parts(begin: int, end: int, each: int) -> list[slice]:
    """The rows from `begin` to `end` in slices of which the similarities, `each` a row, are made at once."""
    step = max(1, LARGEST // max(each, 1))
    return [slice(a, b) for a, b in pairwise([*range(begin, end, step), end])]
