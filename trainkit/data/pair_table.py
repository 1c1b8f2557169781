"""Pairs as ids: every different text once, and rows of their numbers.

A kept table is a folder of flat little-endian files (`*-ids.bin`, `*-starts.bin`, `*-rows.bin`, `*-scores.bin`),
memory-mapped, beside the tokenizer and an index that is written last.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainkit import atomic
from trainkit.data.pair_files import Row
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError
from trainkit.strict import parse_json, read_file, reason

Specials = Literal["none", "end", "template"]
MISSING = -1  # the number of a text that is not there
LONGEST = 8192  # ids of a text that are kept
AT_ONCE = 8192  # texts encoded at once
DTYPES = {"ids": "<u4", "starts": "<i8", "rows": "<i4", "scores": "<f4"}
INDEX, FORMAT = "pairs.json", 1


@dataclass
class PairTable:
    """`rows` (n, P) numbers of texts, -1 where there is none; text i is `ids[starts[i]:starts[i + 1]]`, without
    specials; `scores` (n,) or none; `teacher` (n, P, K) vectors or none."""

    name: str
    ids: NDArray[Any]
    starts: NDArray[Any]
    rows: NDArray[Any]
    scores: NDArray[Any] | None
    teacher: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, longest: int, extra: int) -> NDArray[np.int64]:
        """(n, P) ids of each text of each row with `extra` specials, cut at `longest`; 0 where there is no text."""
        sizes = np.clip(np.diff(self.starts) + extra, 1, longest)
        return np.where(self.rows == MISSING, 0, sizes[self.rows])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write it, and say what an index has to know."""
        hashes = {}
        for part, dtype in DTYPES.items():
            array = getattr(self, part)
            if array is not None:
                data = np.ascontiguousarray(array, dtype=dtype).tobytes()
                atomic.write(folder / f"{self.name}-{part}.bin", data)
                hashes[part] = hashlib.sha256(data).hexdigest()
        return {"name": self.name, "texts": self.rows.shape[1], "rows": len(self.rows), "sha256": hashes}


def load(folder: Path, facts: dict[str, Any]) -> PairTable:
    """The table that `save` wrote, mapped into memory."""
    found: dict[str, Any] = {}
    for part, dtype in DTYPES.items():
        file = folder / f"{facts['name']}-{part}.bin"
        found[part] = np.memmap(file, dtype=dtype, mode="r") if part in facts["sha256"] else None
    return PairTable(name=facts["name"], **{**found, "rows": found["rows"].reshape(-1, facts["texts"])})


def encoded(name: str, rows: Iterable[Row], tokenizer: Tokenizer, prompts: Sequence[str]) -> PairTable:
    """The table of `rows`. `prompts` go before the texts of each column, the last one before those of all further ones.

    Raises:
        UserError: there are no rows, or rows have different numbers of texts.
    """
    numbers: dict[str, int] = {}
    table, scores = [], []
    for texts, score in rows:
        texts = tuple(t and prompted(t, prompts, column) for column, t in enumerate(texts))
        table.append([numbers.setdefault(t, len(numbers)) if t or i < 2 else MISSING for i, t in enumerate(texts)])
        scores.append(score)
    if not table:
        raise UserError(f"{name} has no pairs")
    if len(wide := {len(row) for row in table}) > 1:
        raise UserError(
            f"{name} has rows of {min(wide)} and of {max(wide)} texts: name the columns, data.columns=[...]"
        )
    ids, sizes = [], [0]
    for some in _in_lots(numbers):
        for one in tokenizer.encode_all(some):
            ids.append(one[:LONGEST].astype(np.uint32))
            sizes.append(len(ids[-1]))
    scored = None if any(s is None for s in scores) else np.array(scores, dtype=np.float32)
    return PairTable(name, np.concatenate(ids), np.cumsum(sizes), np.array(table, dtype=np.int32), scored)


def prompted(text: str, prompts: Sequence[str], column: int) -> str:
    """`text` behind the prompt of its column."""
    return prompts[min(column, len(prompts) - 1)] + text if prompts else text


def _in_lots(texts: Iterable[str]) -> Iterator[list[str]]:
    it = iter(texts)
    while some := list(islice(it, AT_ONCE)):
        yield some


@dataclass(frozen=True)
class Ends:
    """What stands before and behind the ids of each text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    empty: int = 0  # stands for a text that has no ids

    @property
    def extra(self) -> int:
        return len(self.before) + len(self.behind)

    def whole(self, ids: NDArray[Any], longest: int) -> list[int]:
        """At most `longest` ids, at least one: a text too long is cut before what stands behind."""
        inside = ids[: max(longest - self.extra, 0)].tolist()
        return ([*self.before, *inside, *self.behind] or [self.empty])[:longest]


def ends(tokenizer: Tokenizer, specials: Specials) -> Ends:
    """`none`; `end`, the tokenizer's end of text; `template`, what the tokenizer itself puts around a text ([CLS] and
    [SEP])."""
    match specials:
        case "none":
            return Ends(empty=tokenizer.eos)
        case "end":
            return Ends(behind=(tokenizer.eos,), empty=tokenizer.eos)
    before, behind = tokenizer.template()
    return Ends(before, behind, tokenizer.eos)


def write_index(folder: Path, key: str, tables: Sequence[PairTable], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the tables and then the index, whose `fingerprint` is what they hold."""
    facts = [table.save(folder) for table in tables]
    content = json.dumps([tokenizer.identity, facts])
    index = {"format": FORMAT, "key": key, "tables": facts, "fingerprint": hashlib.sha256(content.encode()).hexdigest()}
    atomic.write(folder / INDEX, json.dumps(index, indent=1).encode())
    return index


def read_index(folder: Path, key: str) -> dict[str, Any] | None:
    """The index of a folder that was written whole under `key`, else None.

    Raises:
        UserError: it cannot be read.
    """
    if not (folder / INDEX).exists():
        return None
    try:
        index = parse_json(read_file(folder / INDEX, 1 << 20), max_bytes=1 << 20)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / INDEX} cannot be read: {reason(error)}; delete {folder}") from error
    same = isinstance(index, dict) and index.get("key") == key and index.get("format") == FORMAT
    return index if same else None
