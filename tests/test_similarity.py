"""What is measured of vectors, against definitions written out."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainkit import floors
from trainkit.data.pair_loader import Part
from trainkit.data.pair_table import encoded
from trainkit.data.tokenizers import BytesTokenizer
from trainkit.tasks import similarity


def test_ranks_share_the_mean_of_theirs() -> None:
    assert similarity.ranked(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 20.0, 5.0])
    ranks = np.array([2.0, 3.5, 3.5, 1.0])
    expected = np.corrcoef(np.arange(1, 5), ranks)[0, 1]
    assert similarity.spearman(x, y) == pytest.approx(expected, rel=1e-12)
    assert similarity.spearman(x, x.exp()) == pytest.approx(1.0)
    assert math.isnan(similarity.pearson(x, torch.ones(4)))


def by_definition(vectors: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """One query after the other; of equal similarities the one that is no answer comes first."""
    anchors = {int(t): vectors[i, 0] for i, t in enumerate(texts[:, 0])}
    positives = {int(t): vectors[i, 1] for i, t in enumerate(texts[:, 1])}
    right = {a: {int(p) for q, p in texts.tolist() if q == a} for a in anchors}
    found: dict[str, list[float]] = {"ndcg10": [], "mrr": [], "recall1": [], "recall10": []}
    for name, query in anchors.items():
        order = sorted(positives, key=lambda p: (-float(query @ positives[p]), p in right[name]))
        hits = [p in right[name] for p in order]
        gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits[:10]))
        best = sum(1 / math.log2(place + 2) for place in range(min(10, len(right[name]))))
        found["ndcg10"].append(gain / best)
        found["mrr"].append(1 / (hits.index(True) + 1))
        for k in (1, 10):
            found[f"recall{k}"].append(sum(hits[:k]) / min(k, len(right[name])))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("coarse", [False, True])
def test_retrieval_is_its_definition(coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "AT_ONCE", 7)
    draw = torch.Generator().manual_seed(0)
    texts = torch.stack(
        [torch.randint(0, 20, (60,), generator=draw), torch.randint(100, 130, (60,), generator=draw)], 1
    )
    table = torch.nn.functional.normalize(torch.randn(130, 5, generator=draw), dim=-1)
    if coarse:  # so that many similarities are equal
        table = torch.nn.functional.one_hot(torch.arange(130) % 4, 5).float()
    vectors = table[texts]
    assert similarity.retrieval(vectors, texts) == pytest.approx(by_definition(vectors, texts), rel=1e-9)


def test_words_in_common_weigh_what_is_rare() -> None:
    rows: list[Any] = [(("ab", "ac"), None), (("ad", "a"), None), (("b", "x"), None)]
    train = encoded("t", rows, BytesTokenizer(), ())
    scored = encoded(
        "s", [(("ab", "az"), 1.0), (("b", "bc"), 2.0), (("d", "d"), 0.0), (("", "a"), 5.0)], BytesTokenizer(), ()
    )
    part = Part(scored, np.arange(4))
    corpus: Any = SimpleNamespace(train=[Part(train, np.arange(3))], validation=[part])
    idf = {c: math.log(7 / (1 + n)) ** 2 for c, n in {"a": 4, "b": 2, "c": 1, "d": 1, "z": 0}.items()}
    similar = [
        idf["a"] / math.sqrt((idf["a"] + idf["b"]) * (idf["a"] + idf["z"])),
        idf["b"] / math.sqrt(idf["b"] * (idf["b"] + idf["c"])),
        1.0,
        0.0,
    ]
    weights = floors._weights([train])
    found = [floors._cosine(set(a.tolist()), set(b.tolist()), weights) for a, b in floors._texts(part)]
    assert found == pytest.approx(similar, rel=1e-12)
    expected = 100 * similarity.spearman(torch.tensor(similar), torch.tensor([1.0, 2.0, 0.0, 5.0]))
    assert floors.idf_overlap(corpus) == pytest.approx(expected)
