"""Texts that belong together, prepared once and kept: what all kinds of pairs have in common."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval

from trainkit import atomic
from trainkit.config import Count, config, how
from trainkit.data import cache, stsb, tokenizers
from trainkit.data.pair_files import Row
from trainkit.data.pair_loader import PairLoader, Part
from trainkit.data.pair_table import PairTable, Specials, encoded, ends, load, read_index, write_index
from trainkit.data.prepare import Report
from trainkit.data.shards import TOKENIZER
from trainkit.data.tokenizers import Tokenizer, TokenizerConfig

HeldOut = Annotated[float, Interval(ge=0, le=0.5)]
Lines = Callable[[], Iterable[Row]]


@dataclass
class PairCorpus:
    """Prepared pairs. `fingerprint` is what their ids are, wherever they lie."""

    name: str
    tokenizer: Tokenizer
    train: list[Part]
    validation: list[Part]
    weights: list[float]
    fingerprint: str

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def train_tokens(self) -> int:
        return sum(_tokens(part) for part in self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(_tokens(part) for part in self.validation)


@config
class PairRows:
    """What every kind of pairs says: `batch` rows a step over all ranks, whose texts are cut at `length` ids.

    A batch takes rows of similar length, from one of `buckets`, and has half the rows, a quarter and so on where it
    would hold more than `tokens` ids with padding. `specials` stand around each text; `prompts` go before the texts of
    each column. `validation` is the fraction of the rows that is held out, and `sts` a benchmark of scored pairs that
    is evaluated as well.
    """

    gives: ClassVar[str] = "pairs"
    length: Count
    batch: Count
    tokens: Count | None = None
    buckets: Count = 8
    specials: Specials = "none"
    prompts: tuple[str, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation: HeldOut = 0.01
    sts: Literal["dev", "test"] | None = None
    sts_path: str | None = how(None)

    @property
    def held_out(self) -> tuple[str, ...]:
        """What an evaluation may find: `pairs`, `scores` of pairs."""
        scored = ("scores",) if self.sts or (self.validation and self._scores is not False) else ()
        return (*scored, *(("pairs",) if self.validation and self._scores is not True else ()))

    @property
    def _scores(self) -> bool | None:
        """Whether its own rows have scores; None where only reading them tells."""
        return False

    def vocab(self) -> int | None:
        """How many ids the tokenizer has."""
        return self.tokenizer.size()

    def check(self) -> None:
        """Raise UserError when something is missing."""
        self._check()
        if self.sts is not None:
            stsb.check(self.sts_path, "data.sts_path")

    def open(self, report: Report | None = None, tokenizer: Tokenizer | None = None) -> PairCorpus:
        """The corpus, prepared if it is not yet; read by `tokenizer` where one is given.

        Raises:
            UserError: a source is missing or wrong.
        """
        sources, content = self._sources()
        read_by = tokenizer.identity if tokenizer else str(self.tokenizer)
        what = [content, sorted(sources), read_by, self.prompts]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        folder = cache.folder() / "pairs" / key[:32]
        with cache.alone(folder):
            index = read_index(folder, key)
            if index is None:
                if report:
                    report(0, 1, "tokenizing")
                built = tokenizer or self.tokenizer.build(lambda: _texts(sources))
                tables = [encoded(name, lines(), built, self._prompts(name)) for name, lines in sources.items()]
                atomic.write(folder / TOKENIZER, built.save())
                index = write_index(folder, key, tables, built)
        built = tokenizers.load((folder / TOKENIZER).read_bytes())
        tables = [self._with_teacher(load(folder, facts)) for facts in index["tables"]]
        train, validation = zip(*(self._split(table) for table in tables), strict=True)
        scored = self._scored(built)
        return PairCorpus(
            name=self._name(),
            tokenizer=built,
            train=list(train),
            validation=[*scored, *(part for part in validation if len(part.places))],
            weights=[self._weight(table) for table in tables],
            fingerprint=_fingerprint(index["fingerprint"], tables, scored),
        )

    def build(self, corpus: PairCorpus, *, seed: int, ranks: Any, device: torch.device) -> PairLoader:
        """A loader of this rank's share of the batches.

        Raises:
            UserError: a batch does not divide over the ranks, or a source is shorter than a batch.
        """
        return PairLoader(
            corpus.train,
            corpus.validation,
            corpus.weights,
            ends(corpus.tokenizer, self.specials),
            seed=seed,
            length=self.length,
            batch=self.batch,
            tokens=self.tokens,
            buckets=self.buckets,
            ranks=ranks,
            device=device,
        )

    def _check(self) -> None:
        raise NotImplementedError

    def _sources(self) -> tuple[dict[str, Lines], Any]:
        """How to read each source, by name, and what tells their content from any other."""
        raise NotImplementedError

    def _name(self) -> str:
        raise NotImplementedError

    def _weight(self, table: PairTable) -> float:
        return 1.0

    def _prompts(self, name: str) -> tuple[str, ...]:
        return self.prompts

    def _with_teacher(self, table: PairTable) -> PairTable:
        return table

    def _split(self, table: PairTable) -> tuple[Part, Part]:
        """What is learned from and what is held out, every so many rows."""
        every = np.arange(len(table))
        if not self.validation:
            return Part(table, every), Part(table, every[:0])
        period = round(1 / self.validation)
        held = every % period == period // 2
        return Part(table, every[~held]), Part(table, every[held])

    def _scored(self, tokenizer: Tokenizer) -> list[Part]:
        if self.sts is None:
            return []
        prompts = self.prompts[:1]  # both sentences of a pair are of one sort
        table = encoded(f"STS-B {self.sts}", stsb.rows(self.sts, self.sts_path, "data.sts_path"), tokenizer, prompts)
        return [Part(table, np.arange(len(table)))]


def _texts(sources: dict[str, Lines]) -> Iterable[str]:
    """Every different text once, for a tokenizer to learn from."""
    yield from dict.fromkeys(text for lines in sources.values() for texts, _ in lines() for text in texts)


def _tokens(part: Part) -> int:
    return int(part.table.lengths(1 << 62, 0)[part.places].sum())


def _fingerprint(kept: str, tables: list[PairTable], scored: list[Part]) -> str:
    """Of what is learned from; what is only evaluated may change."""
    teachers = [hashlib.sha256(t.teacher.tobytes()).hexdigest() for t in tables if t.teacher is not None]
    return hashlib.sha256(json.dumps([kept, *teachers]).encode()).hexdigest() if teachers else kept
