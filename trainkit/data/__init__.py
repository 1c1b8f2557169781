"""What is learned from: text prepared on the fly, token shards, a weighted mixture of them, or pairs of texts.

`check()` finds what is wrong before anything is read; `open()` gives a corpus; `build()` a loader of it. Where the data
lies is how a run is done; what it is, its fingerprint, is what is learned.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval

from trainkit.config import Count, Natural, Positive, config, how
from trainkit.data import hub
from trainkit.data.cache import prepared
from trainkit.data.chat import Chat
from trainkit.data.loader import Loader, rows
from trainkit.data.pairs import STSB, Pairs, WordNet
from trainkit.data.preferences import Preferences
from trainkit.data.prepare import Report
from trainkit.data.shards import INDEX, Corpus, open_corpus
from trainkit.data.sources import find
from trainkit.data.tokenizers import LEARNED, TokenizerConfig
from trainkit.errors import UserError

HeldOut = Annotated[float, Interval(gt=0, le=0.5)]


@config
class Rows:
    """What every kind of data says: rows of `length` tokens, `batch` of them a step over all ranks, and how many
    `workers` (processes) make batches ahead; a memory-mapped row takes so little that 0, no other process, is usual."""

    gives: ClassVar[str] = "text"
    length: Count
    batch: Count
    workers: Natural = how(0)

    def build(self, corpus: Corpus, *, seed: int, ranks: Any, device: torch.device) -> Loader:
        """A loader of this rank's share of the batches.

        Raises:
            UserError: the batch does not divide over the ranks, or a split is shorter than a row.
        """
        return Loader(
            rows(corpus.train, corpus.weights, corpus.tokenizer, self.length, seed),
            rows(corpus.validation, corpus.weights, corpus.tokenizer, self.length, seed),
            batch=self.batch,
            workers=self.workers,
            ranks=ranks,
            device=device,
        )


@config
class Text(Rows):
    """A file or folder of text, JSONL or Parquet, `builtin:moby-dick`, or `hf:NAME`; prepared once and kept.

    `field` is the JSONL field or Parquet column; `validation` the fraction of the documents that is held out.
    """

    kind: Literal["text"] = "text"
    path: str | None = how(None)
    field: str = "text"
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: HeldOut = 0.05

    def vocab(self) -> int | None:
        """How many ids the tokenizer has."""
        return self.tokenizer.size()

    def check(self) -> None:
        """Raise UserError when there is nothing to read."""
        if self.path is None:
            raise UserError("data.path is missing: give a file or folder, such as data=text data.path=books")
        if not hub.is_dataset(self.path):
            find([self.path])

    def open(self, report: Report | None = None) -> Corpus:
        """The corpus, prepared if it is not yet."""
        assert self.path is not None
        return prepared(self.path, self.tokenizer, field=self.field, validation=self.validation, report=report)


@config
class Shards(Rows):
    """A folder that `trainkit prepare` wrote."""

    kind: Literal["shards"] = "shards"
    path: str | None = how(None)

    def vocab(self) -> int | None:
        """How many ids the shards' tokenizer has."""
        return self.open().vocab

    def check(self) -> None:
        """Raise UserError when there are no whole shards."""
        if self.path is None:
            raise UserError("data.path is missing: give a folder that `trainkit prepare SOURCE --out FOLDER` wrote")
        self.open()

    def open(self, report: Report | None = None) -> Corpus:
        """The corpus."""
        return open_corpus(Path(self.path or ""))


@config
class Source:
    """One part of a mixture: prepared shards or text, and how often it is drawn from."""

    path: str = how(None)
    weight: Positive = 1.0
    field: str = "text"


@config
class Mixture(Rows):
    """Several sources by name, each drawn from by its weight and read with its own epochs. All have one tokenizer: texts
    are read with `tokenizer`, prepared shards must have been."""

    kind: Literal["mixture"] = "mixture"
    sources: dict[str, Source]
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: HeldOut = 0.05

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            raise ValueError(
                "data=mixture needs two sources or more: data.sources.NAME.path=... data.sources.NAME.weight=..."
            )
        if any(source.path is None for source in self.sources.values()):
            raise ValueError("every source of a mixture needs a path: data.sources.NAME.path=...")
        if self.tokenizer.kind in LEARNED:
            raise ValueError(
                f"a mixture cannot train one {self.tokenizer.kind} for all its sources: prepare them with one tokenizer first"
            )

    def vocab(self) -> int | None:
        """How many ids the tokenizer has."""
        prepared = [s.path for s in self.sources.values() if _is_prepared(s)]
        return open_corpus(Path(prepared[0])).vocab if prepared else self.tokenizer.size()

    def check(self) -> None:
        """Raise UserError when a source is missing."""
        for source in self.sources.values():
            if _is_prepared(source):
                open_corpus(Path(source.path))
            elif not hub.is_dataset(source.path):
                find([source.path])

    def open(self, report: Report | None = None) -> Corpus:
        """The corpora as one.

        Raises:
            UserError: they have different tokenizers.
        """
        parts = {name: self._part(source, report) for name, source in self.sources.items()}
        names, corpora = list(parts), list(parts.values())
        for name, corpus in parts.items():
            if corpus.tokenizer.identity != corpora[0].tokenizer.identity:
                raise UserError(
                    f"data.sources.{name} has the tokenizer {corpus.tokenizer.name} and {names[0]} has "
                    f"{corpora[0].tokenizer.name}: prepare them with the same"
                )
        return Corpus(
            name=" + ".join(names),
            tokenizer=corpora[0].tokenizer,
            train=[c.train[0] for c in corpora],
            validation=[c.validation[0] for c in corpora],
            weights=[source.weight for source in self.sources.values()],
            fingerprint=hashlib.sha256(json.dumps([c.fingerprint for c in corpora]).encode()).hexdigest(),
        )

    def _part(self, source: Source, report: Report | None) -> Corpus:
        if _is_prepared(source):
            return open_corpus(Path(source.path))
        return prepared(source.path, self.tokenizer, field=source.field, validation=self.validation, report=report)


def _is_prepared(source: Source) -> bool:
    return (Path(source.path) / INDEX).is_file()


Data = Text | Shards | Mixture | Chat | Preferences | Pairs | WordNet | STSB

__all__ = ["STSB", "Chat", "Data", "Mixture", "Pairs", "Preferences", "Shards", "Source", "Text", "WordNet"]
