"""Text to shards: the same bytes from any number of workers and after any kill, and wrong text refused by its place."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from trainkit.data import prepare as preparing
from trainkit.data import sources
from trainkit.data.prepare import plan, prepare
from trainkit.data.shards import open_corpus, verify
from trainkit.data.tokenizers import TokenizerConfig
from trainkit.errors import UserError

BYTES = TokenizerConfig()
TEXTS = [f"document {i}: " + "words and words, über alles, " * (i % 7 + 1) + "\n" for i in range(60)]


def made(source: str | list[str], out: str = "out", tokenizer: TokenizerConfig = BYTES, **how: Any) -> dict[str, Any]:
    options = {"field": "text", "validation": 0.1} | {k: v for k, v in how.items() if k != "workers"}
    work = plan([source] if isinstance(source, str) else source, tokenizer, **options)
    return prepare(work, tokenizer, Path(out), workers=how.get("workers", 1))


def documents(out: str) -> list[str]:
    corpus = open_corpus(Path(out))
    found = []
    for split in (corpus.train[0], corpus.validation[0]):
        ids = split.read(0, split.tokens)
        found += [
            corpus.tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.where(ids == 256)[0] + 1)[:-1]
        ]
    return sorted(found)


def write(kind: str) -> str:
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS).encode()
    path = Path(f"in.{kind}")
    match kind:
        case "jsonl":
            path.write_bytes(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            path.write_bytes(zstandard.ZstdCompressor().compress(lines))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
        case "folder":
            path.mkdir()
            for i, t in enumerate(TEXTS):
                (path / f"{i:03}.txt").write_text(t)
            (path / "picture.png").write_bytes(b"\x89PNG")
            (path / ".hidden.txt").write_text("not to be read")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder"])
def test_every_kind_of_file_gives_its_documents(kind: str) -> None:
    index = made(write(kind))
    assert documents("out") == sorted(TEXTS)
    assert index["documents"] == 60
    assert index["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert 0.05 < index["tokens"]["validation"] / sum(index["tokens"].values()) < 0.2


def test_folders_leave_out_what_is_no_text() -> None:
    assert plan([write("folder")], BYTES, field="text", validation=0.1).skipped == 1


def test_spans_cut_neither_lines_nor_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made([write("jsonl"), write("folder")], "whole")
    monkeypatch.setattr(sources, "SPAN_BYTES", 100)
    monkeypatch.setattr(preparing, "SPAN_BYTES", 250)
    parts = made(["in.jsonl", "in.folder"], "parts")
    assert documents("parts") == documents("whole") == sorted(TEXTS * 2)
    assert parts["documents"] == whole["documents"]
    assert len(parts["files"]) > 10


def files_of(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "plan.json"}


def test_workers_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("folder")
    monkeypatch.setattr(preparing, "SPAN_BYTES", 600)
    tokenizer = TokenizerConfig(kind="bpe", vocab=300)
    one, three = (made(source, f"out{n}", tokenizer, workers=n) for n in (1, 3))
    assert one == three
    assert files_of("out1") == files_of("out3")


KILLED = """
import sys, time; from pathlib import Path
from trainkit.data import prepare as p; from trainkit.data.tokenizers import TokenizerConfig
p.SPAN_BYTES = 600
slow = p.encode_piece
def encode(*a): time.sleep(0.03); slow(*a)
p.encode_piece = encode
t = TokenizerConfig(); p.prepare(p.plan(['in.folder'], t, field='text', validation=0.1), t, Path('killed'), workers=1)
"""


def test_a_kill_loses_nothing_that_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("folder")
    monkeypatch.setattr(preparing, "SPAN_BYTES", 600)
    made(source, "whole")
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED])
        before = len(list(Path("killed").glob("piece-*.json"))) if Path("killed").exists() else 0
        while child.poll() is None and len(list(Path("killed").glob("piece-*.json"))) < before + 3:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in Path("killed").glob("*.bin")}
    assert len(kept) >= 6
    made(source, "killed")
    assert files_of("killed") == files_of("whole")
    finished = sum(Path(f"killed/{name}").stat().st_mtime_ns == t for name, t in kept.items())
    assert finished >= len(kept) - 2


def test_a_finished_piece_that_changed_is_done_again() -> None:
    source = write("jsonl")
    made(source, "whole")
    made(source)
    files = files_of("out")
    index = json.loads(files.pop("index.json"))
    entry = {"files": index["files"], "documents": index["documents"], "text_bytes": index["text_bytes"]}
    Path("out/index.json").unlink()  # as a kill just before the index leaves it
    Path("out/piece-00000.json").write_text(json.dumps(entry))
    content = bytearray(files["train-00000.bin"])
    content[0] ^= 1
    Path("out/train-00000.bin").write_bytes(content)
    made(source)
    assert files_of("out") == files_of("whole")


def test_another_preparation_is_not_written_over() -> None:
    source = write("jsonl")
    made(source)
    assert made(source) == json.loads(Path("out/index.json").read_text())
    with pytest.raises(UserError, match="out holds another preparation"):
        made(source, validation=0.2)


def test_few_documents_hold_out_their_tail() -> None:
    Path("one.txt").write_text("abcdefghij" * 100)
    index = made("one.txt", validation=0.05)
    assert index["tokens"] == {"train": 951, "validation": 50}
    corpus = open_corpus(Path("out"))
    assert corpus.tokenizer.decode(corpus.validation[0].read(0, 49).tolist()) == ("abcdefghij" * 100)[-49:]


def test_a_flipped_or_missing_byte_of_a_shard_is_found() -> None:
    made(write("jsonl"))
    shard = Path("out/train-00000.bin")
    assert verify(Path("out")) == []
    content = bytearray(shard.read_bytes())
    content[7] ^= 4
    shard.write_bytes(content)
    assert verify(Path("out")) == ["train-00000.bin"]
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match="train-00000.bin is cut short"):
        open_corpus(Path("out"))


WRONG = {
    "latin.txt": (b"caf\xc3\xa9 and caf\xe9", "latin.txt is not UTF-8 at byte 13 (0xe9)"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl at byte 14: not JSON"),
    "field.jsonl": (b'{"body": "a"}\n', "field.jsonl at byte 0: no text in the field 'text'; it has body"),
    "list.jsonl": (b"[1]\n", "the line is no object"),
    "utf.jsonl": (b'{"text": "\xff"}\n', "utf.jsonl at byte 0: not UTF-8"),
    "empty.txt": (b"", "empty.txt: nothing but empty files"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "torn.jsonl.gz cannot be read"),
    "none.gz": (b"plain", "none.gz cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_text_is_refused_by_its_place(name: str) -> None:
    content, words = WRONG[name]
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        made(name)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("out/index.json").exists()


def test_other_wrong_sources_are_refused() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), "in.parquet")
    with pytest.raises(UserError, match="has no column 'text' but body"):
        made("in.parquet")
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"\x89")
    with pytest.raises(UserError, match="pictures holds no text"):
        made("pictures")
    with pytest.raises(UserError, match="there is no built-in corpus 'moby'"):
        made("builtin:moby")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType, SimpleNamespace

    class Set(list):  # type: ignore[type-arg]
        column_names = ("text",)
        _fingerprint = "f"
        data = SimpleNamespace(nbytes=1000)

        def select(self, rows: range) -> list[Any]:
            return [self[i] for i in rows]

    module = ModuleType("datasets")
    module.load_dataset = lambda name, split: Set({"text": t} for t in TEXTS)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    made("hf:some/name")
    assert documents("out") == sorted(TEXTS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the datasets library: pip install 'trainkit\\[hf\\]'"):
        plan(["hf:other"], BYTES, field="text", validation=0.1)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    source = write("jsonl")
    monkeypatch.setattr(preparing.atomic, "write", full)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        made(source)
