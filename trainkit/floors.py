"""What vectors have to beat: those of a model that has learned nothing, and the words that two texts have in common."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainkit.data.pair_corpus import PairCorpus
from trainkit.data.pair_loader import Part
from trainkit.data.pair_table import PairTable
from trainkit.learner import Learner
from trainkit.tasks.similarity import spearman


def idf_overlap(corpus: PairCorpus) -> float | None:
    """Spearman's correlation, times 100, of people's scores with the cosine of two texts as sets of tokens, each
    weighted by its inverse document frequency (Spärck Jones 1972) among all texts that are learned from; None where
    none have scores.
    """
    parts = [part for part in corpus.validation if part.table.scores is not None]
    if not parts:
        return None
    weights = _weights([part.table for part in corpus.train])
    similar = [_cosine(set(a.tolist()), set(b.tolist()), weights) for part in parts for a, b in _texts(part)]
    scores = np.concatenate([part.table.scores[part.places] for part in parts if part.table.scores is not None])
    return 100 * spearman(torch.tensor(similar), torch.from_numpy(scores))


def untrained(it: Learner, batches: int | None) -> dict[str, float]:
    """What the task measures of the learner as it is, before its first update, on as many batches as it will be later."""
    found = it.evaluate(it.loader.validation(batches), lambda: False)
    assert found is not None  # nothing asks it to stop
    return found


def said(it: Learner, corpus: PairCorpus, batches: int | None) -> str | None:
    """The floors in a line, before the first update; None where there are no scores to compare with."""
    overlap = idf_overlap(corpus)
    if overlap is None:
        return None
    begins = untrained(it, batches)["val_spearman"]
    return f"floors (Spearman × 100): as it begins {begins:.1f}, overlap of words by IDF {overlap:.1f}"


def _texts(part: Part) -> list[tuple[NDArray[Any], ...]]:
    table = part.table
    return [tuple(table.ids[table.starts[i] : table.starts[i + 1]] for i in row[:2]) for row in table.rows[part.places]]


def _weights(tables: list[PairTable]) -> "Weights":
    """The weight of every token; one that no text has is rarer than all."""
    documents: Counter[int] = Counter()
    texts = 0
    for table in tables:
        text = np.repeat(np.arange(len(table.starts) - 1), np.diff(table.starts))
        once = np.unique(np.stack([text, table.ids]), axis=1)[1]
        tokens, counts = np.unique(once, return_counts=True)
        documents.update(dict(zip(tokens.tolist(), counts.tolist(), strict=True)))
        texts += len(table.starts) - 1
    return Weights({token: float(np.log((1 + texts) / (1 + n)) ** 2) for token, n in documents.items()}, texts)


class Weights(dict[int, float]):
    """Squared inverse document frequencies by token."""

    def __init__(self, known: Mapping[int, float], texts: int) -> None:
        super().__init__(known)
        self._unknown = float(np.log(1 + texts) ** 2)

    def __missing__(self, token: int) -> float:
        return self._unknown


def _cosine(a: set[int], b: set[int], weights: Weights) -> float:
    both, one, other = (sum(weights[t] for t in tokens) for tokens in (a & b, a, b))
    return both / (one * other) ** 0.5 if one and other else 0.0
