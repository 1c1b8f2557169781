"""Hostile index.json and tokenizer.json, each with words of the line that refuses it, and good ones they are made from."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile import NO_JSON, Cases
from trainkit.data.tokenizers import BytesTokenizer


def index(**changes: Any) -> bytes:
    """An index of `data_folder`, good but for `changes`."""
    value = {
        "format": 1,
        "dtype": "<u2",
        "tokenizer": BytesTokenizer().identity,
        "eos": 256,
        "fingerprint": "0",
        "splits": {"train": [["a.bin", 0, 900]], "validation": [["b.bin", 0, 100]]},
        "files": {"a.bin": {"tokens": 900, "xxh3_128": "0"}, "b.bin": {"tokens": 100, "xxh3_128": "0"}},
    }
    return json.dumps({k: v for k, v in (value | changes).items() if v is not ...}).encode()


def data_folder(folder: Path) -> None:
    """Prepared data without an index; beside it a file that is none of its own, and links to that."""
    folder.mkdir()
    ids = np.arange(1000, dtype="<u2") % 257
    ids[:900].tofile(folder / "a.bin")
    ids[900:].tofile(folder / "b.bin")
    ids.tofile(folder.with_name("outside.bin"))
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "tokenizer.json").write_bytes(BytesTokenizer().save())


def train(*segments: Any) -> bytes:
    return index(splits={"train": list(segments), "validation": [["b.bin", 0, 100]]})


def named(name: str, tokens: Any = 1000) -> bytes:
    return index(
        files={name: {"tokens": tokens}, "b.bin": {"tokens": 100}},
        splits={"train": [[name, 0, 1000]], "validation": [["b.bin", 0, 100]]},
    )


INDEX: Cases = {
    **{case: (raw, "index.json cannot be read") for case, raw in NO_JSON.items()},
    "a list": (b"[]", "prepared by another version"),
    "another format": (index(format=2), "prepared by another version"),
    **{
        f"dtype {dtype}": (index(dtype=dtype), "its dtype ")
        for dtype in ("O", "<f4", "<u8", "u2,u2", "V9999999999", None, ["<u2"], "\n")
    },
    "another tokenizer": (index(tokenizer={"name": "bytes"}), "is not the tokenizer that the shards were made with"),
    "no tokenizer": (index(tokenizer=...), "is not the tokenizer that the shards were made with"),
    "no fingerprint": (index(fingerprint=...), "it lacks its fingerprint, its files or its splits"),
    "a list of files": (index(files=[]), "it lacks its fingerprint, its files or its splits"),
    "no splits": (index(splits=None), "it lacks its fingerprint, its files or its splits"),
    "one split": (index(splits={"train": []}), "its splits are not train and validation"),
    "a split": (index(splits={"train": {}, "validation": []}), "a part of its train is not inside its files"),
    **{
        f"the name {name[:9]!r}": (named(name), "it names a file ")
        for name in (
            "../outside.bin",
            "/etc/passwd",
            "a/../a.bin",
            ".",
            "..",
            "a\0.bin",
            "",
            "x" * 9999,
            "index.json",
            "\n",
        )
    },
    "a link": (named("link.bin"), "link.bin is missing"),
    "a folder": (named("."), "it names a file '.'"),
    "a missing file": (named("c.bin"), "c.bin is missing"),
    "too few tokens": (named("a.bin", 899), "a part of its train is not inside"),
    "too many tokens": (named("a.bin", 1000), "a.bin is cut short"),
    **{
        f"tokens {tokens}": (named("a.bin", tokens), "the tokens of a.bin are no number")
        for tokens in (-1, 2**70, 1.0, True, "900", None, [900])
    },
    **{
        f"the part {part}": (train(part), "a part of its train is not inside its files")
        for part in (
            *(["a.bin", 0, 901], ["a.bin", -1, 900], ["a.bin", 10, 9], ["a.bin", 0, 2**70], ["a.bin", 0.0, 900]),
            *(
                ["a.bin", False, 900],
                ["c.bin", 0, 0],
                ["a.bin", 0],
                "a.bin",
                None,
                [["a.bin"], 0, 1],
                ["../outside.bin", 0, 1],
            ),
        )
    },
}


def tiktoken(**changes: Any) -> bytes:
    ranks = " ".join(base64.b64encode(bytes([i])).decode() for i in range(256))
    value = {
        "kind": "tiktoken",
        "name": "t",
        "pattern": ".",
        "ranks": ranks,
        "ids": None,
        "special": {"<|endoftext|>": 256},
    }
    return json.dumps(value | changes).encode()


def fast(vocab: Any = {"a": 0}, **changes: Any) -> bytes:  # noqa: B006  # nobody changes it
    value = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}
    return json.dumps({"kind": "json", "name": "t", "tokenizer": json.dumps(value | changes)}).encode()


def words(count: int) -> bytes:
    """A tokenizer.json of so many, made in little memory."""
    before, after = fast({"WORDS": 0}).split(b'\\"WORDS\\": 0')
    return before + ", ".join(f'\\"{i:x}\\": {i}' for i in range(count)).encode() + after


TOKENIZER: Cases = {
    **{case: (raw, "not a saved tokenizer") for case, raw in NO_JSON.items()},
    "a list": (b"[]", "not a saved tokenizer"),
    "null": (b"null", "not a saved tokenizer"),
    "a kind": (b'{"kind": ["\\u001b"]}', "kind ['\\x1b']"),
    "a number": (b'{"kind": "json", "name": "t", "tokenizer": 1}', "not a saved tokenizer"),
    "a name": (b'{"kind": "json", "name": 1, "tokenizer": "{}"}', "not a saved tokenizer"),
    "no tokenizer": (b'{"kind": "json", "name": "\\u001b[2J", "tokenizer": "{}"}', "\\x1b[2J is not a tokenizer.json"),
    "deep inside": (json.dumps({"kind": "json", "name": "t", "tokenizer": "[" * 99_999}).encode(), "levels deep"),
    "no words": (fast({}), "t has no ids, or some beyond"),
    "an id of 2**32": (fast({"a": 2**32 - 1}), "t has no ids, or some beyond"),
    "an id of 2**70": (fast({"a": 2**70}), "t is not a tokenizer.json"),
    "many words": (lambda: words(2_000_000), "t has no ids, or some beyond"),
    "more words": (lambda: words(2_300_000), "it holds more than 2250000 values"),
    "a panic": (fast(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "its library gave up"),
    "no pattern": (fast(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "t is not a tokenizer.json"),
    "two of an id": (tiktoken(ids=[0] * 256), "a token or an id stands twice"),
    "two of a token": (tiktoken(ranks="YQ== YQ=="), "a token or an id stands twice"),
    "a special's id": (tiktoken(special={"<|endoftext|>": 5}), "a token or an id stands twice"),
    "a special of 2**31": (tiktoken(special={"<|endoftext|>": 2**31}), "an id is none below 1048576"),
    "no end": (tiktoken(special={"x": 256}), "not a saved tokenizer"),
    **{
        f"ids {ids}": (tiktoken(ranks="YQ==", ids=ids), "not a saved tokenizer")
        for ids in ([-1], [2**70], [0.0], [True], [], 1, "a")
    },
    "no base64": (tiktoken(ranks="!!!!"), "not a saved tokenizer"),
    "no ranks": (tiktoken(ranks=1), "a field has another type than it should"),
    "many ranks": (lambda: tiktoken(ranks=" " * (2 << 20)), "it has more than 1048576 tokens"),
    "a bad pattern": (tiktoken(pattern="("), "not a saved tokenizer"),
}
