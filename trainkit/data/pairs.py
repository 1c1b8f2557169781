"""Where pairs come from: files, WordNet, STS-B.

`check()` finds what is wrong before anything is read; `open()` gives a corpus; `build()` a loader of it.
"""

import hashlib
import json
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainkit.config import Positive, config, how
from trainkit.data import hub, pair_files, stsb, wordnet
from trainkit.data.pair_corpus import Lines, PairRows
from trainkit.data.pair_files import Row
from trainkit.data.pair_table import PairTable
from trainkit.data.shards import hash_file
from trainkit.data.sources import find
from trainkit.errors import UserError, nearest


@config
class PairSource:
    """One source of pairs: a file or folder, or `hf:NAME`, its columns (none: found by name), the column of its score,
    how often a batch is drawn from it, and prompts of its own."""

    path: str | None = how(None)
    columns: tuple[str, ...] = ()
    score: str | None = None
    weight: Positive = 1.0
    prompts: tuple[str, ...] | None = None


@config
class Pairs(PairRows):
    """A file or folder of TSV, CSV, JSON lines or Parquet, or `hf:NAME`; or several `sources`, each batch from one of
    them.

    `columns` are the texts' (anchor, positive, hard negatives), by name or, in a file without names, by number from 0;
    `score` is that of a score. `teacher` is a .npy of the vectors (rows, columns, width) or (rows, width) that
    task.loss=distill learns.
    """

    kind: Literal["pairs"] = "pairs"
    path: str | None = how(None)
    columns: tuple[str, ...] = ()
    score: str | None = None
    sources: dict[str, PairSource] = field(default_factory=dict)
    teacher: str | None = how(None)

    def __post_init__(self) -> None:
        if self.sources and (self.path or self.columns or self.score):
            raise ValueError(
                "data.sources has paths and columns of its own: data.path, data.columns and data.score must go"
            )
        if self.sources and self.teacher:
            raise ValueError("data.teacher is of the rows of one data.path: data.sources must go")
        if nameless := [name for name, source in self.sources.items() if source.path is None]:
            raise ValueError(f"data.sources.{nameless[0]} needs a path: data.sources.{nameless[0]}.path=...")

    def _every(self) -> dict[str, PairSource]:
        if self.sources:
            return self.sources
        return {"pairs": PairSource(path=self.path, columns=self.columns, score=self.score)}

    @property
    def _scores(self) -> bool | None:
        return (
            None if any(not s.columns for s in self._every().values()) else any(s.score for s in self._every().values())
        )

    def _check(self) -> None:
        for source in self._every().values():
            if source.path is None:
                raise UserError("data.path is missing: give a file with pairs, such as data=pairs data.path=pairs.tsv")
            if not hub.is_dataset(source.path):
                find([source.path])
        if self.teacher is not None and not Path(self.teacher).is_file():
            raise UserError(
                f"data.teacher={self.teacher} does not exist: trainkit embed TEACHER < texts > {self.teacher}"
            )

    def _sources(self) -> tuple[dict[str, Lines], Any]:
        every = self._every()
        content = [[name, _content(s.path), s.columns, s.score, s.prompts] for name, s in every.items() if s.path]
        return {name: _lines(source) for name, source in every.items()}, content

    def _name(self) -> str:
        return " + ".join(self.sources) if self.sources else Path(self.path or "").name

    def _weight(self, table: PairTable) -> float:
        return self._every()[table.name].weight

    def _prompts(self, name: str) -> tuple[str, ...]:
        own = self._every()[name].prompts
        return self.prompts if own is None else own

    def _with_teacher(self, table: PairTable) -> PairTable:
        """Raise UserError where the teacher's vectors are not of this table's rows."""
        if self.teacher is None:
            return table
        try:
            vectors: NDArray[Any] = np.lib.format.open_memmap(self.teacher, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"data.teacher={self.teacher} cannot be read: {error}") from error
        vectors = vectors[:, None] if vectors.ndim == 2 else vectors
        if vectors.shape[:2] != table.rows.shape or vectors.ndim != 3:
            raise UserError(
                f"data.teacher={self.teacher} has vectors of {vectors.shape[:-1]} texts and the data has {table.rows.shape}"
            )
        return replace(table, teacher=vectors)


@config
class WordNet(PairRows):
    """WordNet's 510,886 pairs (of version 3.0), each batch of one kind: words and glosses, synonyms, glosses and those
    of hypernyms, examples and glosses. `path` is the folder of its files; else it is looked for. `weights` say how
    often a batch is of a kind, where it is not to be as often as there are pairs of it; a kind that is not mentioned
    weighs 1."""

    kind: Literal["wordnet"] = "wordnet"
    path: str | None = how(None)
    weights: dict[str, Positive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if odd := [kind for kind in self.weights if kind not in wordnet.KINDS]:
            raise ValueError(f"data.weights.{odd[0]} is no kind of pair{nearest(odd[0], wordnet.KINDS)}")

    def _check(self) -> None:
        wordnet.folder(self.path)

    def _sources(self) -> tuple[dict[str, Lines], Any]:
        place = wordnet.folder(self.path)
        content = [hash_file(place / file) for file in wordnet.FILES]
        kinds: dict[str, list[Row]] = {}

        def of(kind: str) -> Lines:
            def lines() -> list[Row]:
                if not kinds:
                    kinds.update(wordnet.pairs(place))
                return kinds[kind]

            return lines

        return {kind: of(kind) for kind in wordnet.KINDS}, ["wordnet", content]

    def _name(self) -> str:
        return "wordnet"

    def _weight(self, table: PairTable) -> float:
        return self.weights.get(table.name, float(len(table)) if not self.weights else 1.0)


@config
class STSB(PairRows):
    """STS-B's 5,749 scored pairs to learn from; `sts` says which split is evaluated."""

    kind: Literal["stsb"] = "stsb"

    @property
    def _scores(self) -> bool | None:
        return True

    def _check(self) -> None:
        stsb.check(self.sts_path, "data.sts_path")

    def _sources(self) -> tuple[dict[str, Lines], Any]:
        rows = list(stsb.rows("train", self.sts_path, "data.sts_path"))
        content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {"train": lambda: rows}, ["stsb", content]

    def _name(self) -> str:
        return "STS-B"


def _lines(source: PairSource) -> Lines:
    return lambda: pair_files.read(source.path or "", source.columns, source.score)


def _content(path: str) -> Any:
    """What tells the content of a source from any other."""
    if hub.is_dataset(path):
        return [path, hub.dataset(path, None)._fingerprint]
    return [hash_file(file) for file in find([path])[0]]
