"""Batches are a function of (step, seed, ranks), against what the text says itself."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import Mixture, Shards, Source, Text
from trainkit.data.loader import Loader
from trainkit.data.order import Shares, permuted
from trainkit.data.sources import find, read, spans
from trainkit.errors import UserError

CPU = torch.device("cpu")
EOS = 256


def loader(data: Any, *, seed: int = 0, rank: int = 0, size: int = 1) -> Loader:
    return data.build(data.open(), seed=seed, ranks=SimpleNamespace(reader=rank, readers=size), device=CPU)


def text(**other: Any) -> Text:
    return Text(**({"path": "corpus", "length": 16, "batch": 12, "validation": 0.2} | other))


@given(st.integers(1, 5000), st.tuples(st.integers(0, 2**63), st.integers(0, 9)))
@settings(max_examples=60, deadline=None)
def test_the_order_is_a_permutation(size: int, key: tuple[int, ...]) -> None:
    found = permuted(np.arange(size), size, key)
    assert sorted(found.tolist()) == list(range(size))


def test_the_order_is_no_order() -> None:
    n = 4096
    found, other = (permuted(np.arange(n), n, (seed, 0)) for seed in (0, 1))
    assert (found == other).sum() < 12  # one in n by chance
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.06
    assert (np.diff(found) == 1).sum() < 12


def ids_of(text_: str) -> list[int]:
    return [*text_.encode(), EOS]


def test_rows_are_what_the_text_says() -> None:
    data = text()
    it = loader(data)
    files = sorted(Path("corpus").iterdir())
    train = [f for i, f in enumerate(files) if i % 5 != 2]
    stream = [i for f in train for i in ids_of(f.read_text())]
    samples = (len(stream) - 1) // 16
    seen = []
    for step in range(-(-samples // 12)):
        batch = it.at(step)
        for row in range(12):
            sample = int(batch["ids"][row])
            seen.append(sample)
            window = stream[sample * 16 : sample * 16 + 17]
            assert batch["tokens"][row].tolist() == window[:-1]
            labels = [-100 if now == EOS else then for now, then in itertools.pairwise(window)]
            assert batch["labels"][row].tolist() == labels
            assert int(batch["bytes"][row]) == sum(0 <= i < 256 for i in labels)
            document, expected = 0, []
            for now in window[:-1]:
                expected.append(document)
                document += now == EOS
            if "documents" in batch:
                assert batch["documents"][row].tolist() == expected
            else:
                assert set(expected) == {0}
    assert sorted(seen[:samples]) == list(range(samples))  # the first epoch has each once
    assert any("documents" in it.at(step) for step in range(5))
    assert it.epoch(samples) == 12


def test_one_document_a_batch_has_no_documents() -> None:
    Path("one.txt").write_text("x" * 5000)
    it = loader(text(path="one.txt", batch=4))
    assert all("documents" not in it.at(step) for step in range(40))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_ranks_share_the_same_global_batch(size: int) -> None:
    whole = loader(text())
    parts = [loader(text(), rank=rank, size=size) for rank in range(size)]
    for step in (0, 1, 7, 1000):
        for key in ("tokens", "labels", "ids", "bytes"):
            assert torch.equal(torch.cat([p.at(step)[key] for p in parts]), whole.at(step)[key])
    batches = list(whole.validation())
    shared = [list(p.validation()) for p in parts]
    for i, batch in enumerate(batches):
        assert torch.equal(torch.cat([s[i]["labels"] for s in shared]), batch["labels"])


def test_a_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UserError, match="data.batch=12 rows do not divide over 5 ranks: use 10 or 15"):
        loader(text(), size=5)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    it = loader(text())
    first = torch.cat([it.at(s)["ids"] for s in range(4)])
    assert not torch.equal(first, torch.cat([loader(text(), seed=1).at(s)["ids"] for s in range(4)]))
    samples = round(4 * 12 / it.epoch(4))
    order = torch.cat([it.at(s)["ids"] for s in range(2 * samples // 12 + 1)])
    one, two = order[:samples], order[samples : 2 * samples]
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert not torch.equal(one, two)


@pytest.fixture
def with_workers() -> Iterator[Loader]:
    it = loader(text(workers=2))
    yield it
    it.close()


def test_workers_make_the_same_batches_from_any_step(with_workers: Loader) -> None:
    plain = loader(text())
    for step in (0, 1, 2, 3, 50, 51, 4):
        ours, theirs = with_workers.at(step), plain.at(step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_validation_is_all_of_it_each_time_the_same() -> None:
    it = loader(text())
    files = sorted(Path("corpus").iterdir())
    held_out = [i for f in (files[2], files[7]) for i in ids_of(f.read_text())]
    rows = (len(held_out) - 1) // 16
    batches = list(it.validation())
    ids = torch.cat([b["ids"] for b in batches])
    assert ids[ids >= 0].tolist() == list(range(rows))
    assert len(ids) % 12 == 0
    for batch in batches:
        for row, sample in enumerate(batch["ids"].tolist()):
            if sample < 0:
                assert set(batch["labels"][row].tolist()) == {-100}
                assert int(batch["bytes"][row]) == 0
            else:
                assert batch["tokens"][row].tolist() == held_out[sample * 16 : sample * 16 + 16]
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches, it.validation(), strict=True))
    assert len(list(it.validation(1))) == 1


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_shares_are_exact_in_every_block(weights: list[float], block: int) -> None:
    shares = Shares(weights)
    positions = np.arange(block * 1024, (block + 1) * 1024)
    source, place = shares.at(positions, (0,))
    counts = np.bincount(source, minlength=len(weights))
    exact = np.array(weights) / sum(weights) * 1024
    assert (np.abs(counts - exact) < 1).all()
    for s, count in enumerate(counts):
        assert sorted(place[source == s].tolist()) == list(range(block * count, (block + 1) * count))


def mixture(**other: Any) -> Mixture:
    sources = {"a": Source(path="corpus/0.txt", weight=3.0), "b": Source(path="corpus/2.txt")}
    return Mixture(**({"sources": sources, "length": 8, "batch": 64, "validation": 0.2} | other))


def test_a_mixture_draws_by_weight_and_reads_each_source_evenly() -> None:
    it = loader(mixture())
    ids = torch.cat([it.at(step)["ids"] for step in range(32)])
    assert int((ids >> 48 == 0).sum()) == 3 * 512
    for s in (0, 1):
        times = torch.bincount(ids[ids >> 48 == s] & ((1 << 48) - 1))
        assert int(times.max() - times.min()) <= 1  # no sample twice before every one once
    half = [loader(mixture(), rank=rank, size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.at(5)["ids"] for p in half]), it.at(5)["ids"])
    tokens = bytes(int(i) for i in it.at(0)["tokens"][it.at(0)["ids"] >> 48 == 1][0] if i < 256).decode()
    assert tokens in Path("corpus/2.txt").read_text()


def test_a_mixture_of_one_or_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="two sources or more"):
        mixture(sources={"a": Source(path="corpus")})
    with pytest.raises(ValueError, match="needs a path"):
        mixture(sources={"a": Source(path="corpus"), "b": Source()})


def test_the_embedded_corpus_is_the_book() -> None:
    files, _ = find(["builtin:moby-dick"])
    chapters = [t for span in spans(files) for t, _ in read(span, "text")]
    assert len(chapters) == 135
    digest = hashlib.sha256("".join(chapters).encode()).hexdigest()
    assert digest == "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"


def test_the_cache_knows_a_text_by_what_it_holds(cache: Path) -> None:
    first = text().open()
    Path("corpus").rename("moved")
    assert text(path="moved").open().train[0].folder == first.train[0].folder
    Path("moved/0.txt").write_text("another beginning " * 9)
    assert text(path="moved").open().fingerprint != first.fingerprint
    with pytest.raises(UserError, match="does not exist"):
        text().check()


def test_shards_need_an_index() -> None:
    with pytest.raises(UserError, match="corpus holds no token shards: make them with trainkit prepare"):
        Shards(path="corpus", length=8, batch=1).check()
