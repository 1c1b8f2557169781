"""Token shards: memory-mapped ids in flat files, and one JSON index that says what they are.

    index.json               format, dtype, tokenizer, splits, counts, a hash of every file
    tokenizer.json           the tokenizer itself
    train-00000.bin ...      ids, little-endian uint16 or uint32; every document ends with the tokenizer's eos,
    validation-00000.bin     which no text encodes to: it is what marks the documents' boundaries

A split is a list of `[file, start, stop]`, in ids. The index is written last: a folder without one is not prepared.
"""

import os
import re
import stat
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
from trainkit.strict import one_line, parse_json, read_file, reason

FORMAT = 1
INDEX, TOKENIZER = "index.json", "tokenizer.json"
MAX_INDEX = 64 << 20  # bytes: of some two terabytes of text
MAX_TOKENS = 1 << 48
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
        return [_mapped(self.folder / name, self.dtype, stop)[start:stop] for name, start, stop in self.segments]

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

    def where(self, place: int) -> tuple[Path, int]:
        """The file that holds the id at `place`, and its number there, from 0."""
        i = int(np.searchsorted(self._begins, place, side="right")) - 1
        name, start, _ = self.segments[i]
        return self.folder / name, start + place - int(self._begins[i])


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
    """The corpus that `prepare` wrote into `folder`, which may have come from anyone: no file outside it is opened.

    Raises:
        UserError: it is not there, or a file is missing or has another size than the index says.
    """
    index = _index(folder)
    try:
        saved = read_file(folder / TOKENIZER, tokenizers.MAX_BYTES, follow=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{TOKENIZER} cannot be read: {reason(error)}") from error
    tokenizer = tokenizers.load(saved)
    if tokenizer.identity != index.get("tokenizer"):
        raise UserError(f"{folder}/{TOKENIZER} is not the tokenizer that the shards were made with")
    width = np.dtype(index["dtype"]).itemsize
    for file, facts in index["files"].items():
        size = _size(folder / file)
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
    files = _index(folder)["files"]
    return [f for f, facts in files.items() if _size(folder / f) is None or hash_file(folder / f) != facts["xxh3_128"]]


def _index(folder: Path) -> dict[str, Any]:
    """A folder's index, every field that is used of its type and in its range.

    Raises:
        UserError: there is none, or it is wrong.
    """
    try:
        index = parse_json(read_file(folder / INDEX, MAX_INDEX, follow=False), max_bytes=MAX_INDEX)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no token shards: make them with trainkit prepare SOURCE --out {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{INDEX} cannot be read: {reason(error)}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{folder} was prepared by another version of trainkit: prepare it again")
    if wrong := _wrong(index):
        raise UserError(one_line(f"{folder}/{INDEX} is no index: {wrong}"))
    return index


def _wrong(index: dict[str, Any]) -> str | None:
    """What in an index is not what it should be."""
    files, splits = index.get("files"), index.get("splits")
    if index.get("dtype") not in ("<u2", "<u4"):
        return f"its dtype {index.get('dtype')!r} is none of <u2 and <u4"
    if not isinstance(index.get("fingerprint"), str) or not isinstance(files, dict) or not isinstance(splits, dict):
        return "it lacks its fingerprint, its files or its splits"
    for file, facts in files.items():
        if not _FILE.fullmatch(file) or file in (INDEX, TOKENIZER):
            return f"it names a file {file!r}"
        if not isinstance(facts, dict) or not _is_count(facts.get("tokens"), MAX_TOKENS):
            return f"the tokens of {file} are no number"
    if set(splits) != {"train", "validation"}:
        return "its splits are not train and validation"
    for split, segments in splits.items():
        if not isinstance(segments, list) or not all(_is_segment(s, files) for s in segments):
            return f"a part of its {split} is not inside its files"
    return None


def _is_segment(value: Any, files: dict[str, Any]) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str) or value[0] not in files:
        return False
    _, start, stop = value
    return _is_count(stop, files[value[0]]["tokens"]) and _is_count(start, stop)


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _size(path: Path) -> int | None:
    """A file's size; None where there is none, or only a link, which may lead anywhere."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _mapped(path: Path, dtype: str, tokens: int) -> NDArray[Any]:
    """The first `tokens` ids of a file, mapped into memory.

    Raises:
        UserError: it is not there any more as it was when the index was read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            return np.memmap(file, dtype=dtype, mode="r", shape=(tokens,)) if tokens else np.empty(0, dtype)
    except (OSError, ValueError) as error:  # ValueError: it is shorter
        raise UserError(f"{path} is missing or cut short: prepare it again") from error


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
