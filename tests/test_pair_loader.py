"""Which rows make a batch of pairs, and when."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_pairs import ALONE, CPU
from trainkit.data.pair_loader import Buckets, PairLoader, Part
from trainkit.data.pair_table import Ends, encoded
from trainkit.data.tokenizers import BytesTokenizer
from trainkit.errors import UserError


def table_of(sizes: list[int], texts: int = 2) -> Any:
    rows = [((*("x" * n for _ in range(texts - 1)), f"{'y' * n}"), None) for n in sizes]
    return encoded("t", rows, BytesTokenizer(), ())


def buckets(sizes: list[int], **how: Any) -> Buckets:
    table = table_of(sizes)
    part = Part(table, np.arange(len(table)))
    return Buckets(part, Ends(), **{"length": 64, "batch": 4, "tokens": None, "buckets": 2, **how})


def test_an_epoch_has_every_row_once_and_the_next_another_order() -> None:
    it = buckets([1 + i % 30 for i in range(64)])
    assert it.batches == 16
    epochs = [[it.at(e * 16 + i, (7, 0)) for i in range(16)] for e in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).tolist()) == list(range(64))
    assert [b.tolist() for b in epochs[0]] != [b.tolist() for b in epochs[1]]
    assert [b.tolist() for b in epochs[0]] != [it.at(i, (8, 0)).tolist() for i in range(16)]
    one, two = ({frozenset(b.tolist()) for b in epoch} for epoch in epochs)
    assert not one & two  # other rows are together, too
    half = sorted(1 + i % 30 for i in range(64))[32]
    for batch in epochs[0]:  # rows of similar length are together
        sizes = [1 + row % 30 for row in batch.tolist()]
        assert max(sizes) <= half or min(sizes) >= half


def test_a_batch_stays_within_its_tokens() -> None:
    it = buckets([3] * 32 + [20] * 32, tokens=50)
    assert it.rows == [4, 1]  # 4 rows of two texts of 3; one of two of 20
    seen = {len(it.at(i, (0, 0))) for i in range(it.batches)}
    assert seen == {4, 1}
    assert buckets([3] * 32, tokens=1, buckets=1).rows == [1]


def loader(ranks: Any = ALONE, **how: Any) -> PairLoader:
    table = table_of([1 + i % 9 for i in range(40)], texts=3)
    part, rest = Part(table, np.arange(30)), Part(table, np.arange(30, 40))
    words = {"seed": 3, "length": 6, "batch": 4, "tokens": None, "buckets": 1, "device": CPU, "ranks": ranks, **how}
    return PairLoader([part], [rest], [1.0], Ends(empty=256), **words)


def test_the_global_batch_does_not_depend_on_ranks() -> None:
    whole = loader()
    for step in (0, 3, 11):
        batch = whole.at(step)
        halves = [loader(SimpleNamespace(rank=r, size=2)).at(step) for r in (0, 1)]
        for name in ("ids", "texts", "lengths"):
            assert torch.equal(batch[name], torch.cat([h[name] for h in halves]))
        for row in range(4):
            here, inside = halves[row // 2], row % 2
            size = int(batch["lengths"][row, 1])
            assert torch.equal(batch["tokens1"][row, :size], here["tokens1"][inside, :size])
        assert torch.equal(loader().at(step)["ids"], batch["ids"])
    assert int(batch["lengths"].max()) <= 6
    assert batch["tokens0"].shape == (4, int(batch["lengths"][:, 0].max()))
    assert (batch["tokens0"][torch.arange(batch["tokens0"].shape[1]) >= batch["lengths"][:, :1]] == 256).all()
    assert whole.epoch(7) == 1.0


def test_validation_is_in_order_and_filled_with_empty_rows() -> None:
    batches = list(loader().validation())
    assert torch.cat([b["ids"] for b in batches]).tolist() == [*range(30, 40), -1, -1]
    assert batches[-1]["texts"][-1].tolist() == [-1, -1, -1]
    assert batches[-1]["lengths"][-1].tolist() == [1, 1, 1]
    assert len(list(loader().validation(1))) == 1
    with pytest.raises(UserError, match="do not divide over 3 ranks"):
        loader(SimpleNamespace(rank=0, size=3))
    with pytest.raises(UserError, match="no batch of 64"):
        loader(batch=64)
