"""Token shards: memory-mapped ids in flat files, and one JSON index that says what they are.

    index.json               format, dtype, tokenizer, splits, counts, a hash of every file
    tokenizer.json           the tokenizer itself
    train-00000.bin ...      ids, little-endian uint16 or uint32; every document ends with the tokenizer's eos,
    validation-00000.bin     which no text encodes to: it is what marks the documents' boundaries

A split is a list of `[file, start, stop]`, in ids. The index is written last: a folder without one is not prepared.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainkit.data import tokenizers
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError

FORMAT = 1
INDEX, TOKENIZER = "index.json", "tokenizer.json"


@dataclass
class Split:
    """The ids of a split, end to end. Files are opened when they are first read, so that it travels to workers light."""

    folder: Path
    segments: list[tuple[str, int, int]]
    dtype: str

    @property
    def tokens(self) -> int:
        return sum(stop - start for _, start, stop in self.segments)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_begins")}

    @cached_property
    def _files(self) -> list[NDArray[Any]]:
        return [
            np.memmap(self.folder / name, dtype=self.dtype, mode="r")[start:stop] for name, start, stop in self.segments
        ]

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        sizes = [stop - start for _, start, stop in self.segments]
        return np.cumsum([0, *sizes])

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """`length` ids from place `start`, over the files' edges."""
        out = np.empty(length, dtype=np.int64)
        i = int(np.searchsorted(self._begins, start, side="right")) - 1
        filled = 0
        while filled < length:
            inside = start + filled - int(self._begins[i])
            part = self._files[i][inside : inside + length - filled]
            out[filled : filled + len(part)] = part
            filled, i = filled + len(part), i + 1
        return out


@dataclass
class Corpus:
    """Prepared text, from one source or from several with weights. `fingerprint` is what its ids are, wherever they
    lie."""

    name: str
    tokenizer: Tokenizer
    train: list[Split]
    validation: list[Split]
    weights: list[float]
    fingerprint: str

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def train_tokens(self) -> int:
        return sum(split.tokens for split in self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(split.tokens for split in self.validation)


def open_corpus(folder: Path, name: str | None = None) -> Corpus:
    """The corpus that `prepare` wrote into `folder`.

    Raises:
        UserError: it is not there, or a file is missing or has another size than the index says.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
        saved = (folder / TOKENIZER).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no token shards: make them with trainkit prepare SOURCE --out {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{INDEX} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{folder} was prepared by another version of trainkit: prepare it again")
    tokenizer = tokenizers.load(saved)
    if tokenizer.identity != index["tokenizer"]:
        raise UserError(f"{folder}/{TOKENIZER} is not the tokenizer that the shards were made with")
    width = np.dtype(index["dtype"]).itemsize
    for file, facts in index["files"].items():
        size = (folder / file).stat().st_size if (folder / file).exists() else None
        if size != facts["tokens"] * width:
            raise UserError(f"{folder}/{file} is {'missing' if size is None else 'cut short'}: prepare it again")
    splits = {k: Split(folder, [(f, a, b) for f, a, b in v], index["dtype"]) for k, v in index["splits"].items()}
    return Corpus(
        name=name or folder.name,
        tokenizer=tokenizer,
        train=[splits["train"]],
        validation=[splits["validation"]],
        weights=[1.0],
        fingerprint=index["fingerprint"],
    )


def verify(folder: Path) -> list[str]:
    """The files whose content is not what the index says; none of them when all is well."""
    index = json.loads((folder / INDEX).read_bytes())
    return [f for f, facts in index["files"].items() if hash_file(folder / f) != facts["xxh3_128"]]


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
