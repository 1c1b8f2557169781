"""Conversations to learn from: JSON lines or a Hugging Face data set, written out by the model's own chat template.

They are tokenized when a run begins, and held in memory: five bytes a token.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Interval

from trainkit.config import Count, Natural, config, how
from trainkit.data import hub, templates, tokenizers
from trainkit.data.learned import LEARNED
from trainkit.data.loader import Loader
from trainkit.data.packing import PackedRows, Sequences
from trainkit.data.sources import find, lines, spans
from trainkit.data.tokenizers import JsonTokenizer, Tokenizer, TokenizerConfig
from trainkit.errors import UserError
from trainkit.strict import read_file, reason

SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass
class ChatCorpus:
    """Tokenized conversations."""

    name: str
    tokenizer: Tokenizer
    train: Any
    validation: Any
    fingerprint: str

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def train_tokens(self) -> int:
        return int(self.train.tokens)

    @property
    def validation_tokens(self) -> int:
        return int(self.validation.tokens)


@config
class Chat:
    """`path` is JSON lines (or a folder of them), or `hf:NAME`; `field` holds each conversation: messages with a `role` and a
    `content`. Rows of `length` tokens hold several of them (`pack`) or one; `learn` is what has a loss.

    `template` is a file that stands in for the tokenizer's chat template. A conversation that is longer than a row loses its
    end.
    """

    gives: ClassVar[str] = "conversations"
    kind: Literal["chat"] = "chat"
    path: str | None = how(None)
    field: str = "messages"
    length: Count
    batch: Count
    workers: Natural = how(0)
    tokenizer: TokenizerConfig = TokenizerConfig()
    template: str | None = how(None)
    learn: Literal["assistant", "all"] = "assistant"
    pack: bool = True
    validation: Annotated[float, Interval(gt=0, le=0.5)] = 0.05

    def vocab(self) -> int | None:
        """How many ids the tokenizer has."""
        return self.tokenizer.size()

    def check(self) -> None:
        """Raise UserError when there is nothing to read."""
        if self.path is None:
            raise UserError(
                "data.path is missing: give a file of conversations, such as data=chat data.path=chats.jsonl"
            )
        if self.tokenizer.kind in LEARNED:
            raise UserError(
                "data=chat trains no tokenizer: use model=hf, whose own comes along, or data.tokenizer.kind=hf"
            )
        if not hub.is_dataset(self.path):
            find([self.path])

    def open(self, report: Any = None) -> ChatCorpus:
        """The conversations as tokens.

        Raises:
            UserError: a line is no conversation, or the template cannot write one.
        """
        assert self.path is not None
        tokenizer = self.tokenizer.build(list)
        files = () if hub.is_dataset(self.path) else find([self.path])[0]
        changed = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        template = self._template(tokenizer)
        return _opened(self.path, changed, self.field, tokenizer.save(), template, self.learn, self.validation)

    def build(self, corpus: ChatCorpus, *, seed: int, ranks: Any, device: torch.device) -> Loader:
        """A loader of this rank's share of the batches.

        Raises:
            UserError: the batch does not divide over the ranks, or a split is empty.
        """
        sizes = corpus.tokenizer.token_bytes()
        train, validation = (
            PackedRows(part, sizes, corpus.tokenizer.eos, self.length, seed, self.pack)
            for part in (corpus.train, corpus.validation)
        )
        return Loader(train, validation, batch=self.batch, workers=self.workers, ranks=ranks, device=device)

    def _template(self, tokenizer: Tokenizer) -> str:
        if self.template is None:
            return template_of(tokenizer)
        try:
            return read_file(Path(self.template), 1 << 20).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"data.template={self.template} cannot be read: {reason(error)}") from error


def template_of(tokenizer: Tokenizer) -> str:
    """A tokenizer's chat template; one of plain words where it has none."""
    words: Mapping[str, str] = getattr(tokenizer, "words", {})
    return words.get("template", PLAIN)


def prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation up to where the assistant's next words begin."""
    words = getattr(tokenizer, "words", {})
    return marked(tokenizer, templates.rendered(template_of(tokenizer), words, messages, reply=True))[0]


def marked(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text whose special tokens are what they look like, and the character at which each begins."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.encode_marked(text)
    ids = tokenizer.encode(text).tolist()
    begins = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    return ids, begins


@lru_cache(maxsize=1)  # the first rank opens it twice
def _opened(
    path: str, changed: tuple[Any, ...], field: str, saved: bytes, template: str, learn: str, validation: float
) -> ChatCorpus:
    tokenizer = tokenizers.load(saved)
    words = getattr(tokenizer, "words", {})
    every = round(1 / validation)
    parts: list[list[tuple[list[int], list[bool]]]] = [[], []]
    for number, (where, messages) in enumerate(conversations(path, field)):
        try:
            if learn == "all":
                text = templates.rendered(template, words, messages)
                ids, learned = marked(tokenizer, text)[0], None
            else:
                text, spans_ = templates.with_spans(template, words, messages)
                ids, begins = marked(tokenizer, text)
                learned = inside(begins, spans_)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        parts[number % every == every // 2].append((ids, learned or [True] * len(ids)))
    if not parts[1] and len(parts[0]) > 1:
        parts[1].append(parts[0].pop())
    train, held_out = (joined(part) for part in parts)
    if not (train.learned.any() and held_out.learned.any()):
        raise UserError(f"{path} holds no two conversations in which an assistant says something")
    digest = hashlib.sha256(json.dumps(tokenizer.identity).encode())
    for part in (train, held_out):
        for array in (part.ids, part.learned, part.begins):
            digest.update(array.tobytes())
    return ChatCorpus(Path(path).name, tokenizer, train, held_out, digest.hexdigest())


def conversations(path: str, field: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The conversations of a source in order, each with the place that it is from.

    Raises:
        UserError: one is none.
    """
    for where, value in values(path, field):
        if isinstance(value, list) and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value):
            value = [{"role": SHAREGPT.get(m["from"], m["from"]), "content": m["value"]} for m in value]
        if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
            raise UserError(f"{where}: '{field}' is no list of messages with a role and a content")
        yield where, value


def values(path: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """What `field` holds in each line or row of a source (None: all of it), with its place."""
    if hub.is_dataset(path):
        for number, row in enumerate(hub.dataset(path, field or "prompt")):
            yield f"{path} row {number}", row if field is None else row[field]
        return
    for span in spans(find([path])[0]):
        if span.kind != "lines":
            raise UserError(f"{span.path} is no file of JSON lines: conversations are read from .jsonl")
        for offset, line in lines(span):
            if not line.strip():
                continue
            where = f"{span.path} at byte {offset}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: the line is no object")
            if field is not None and field not in row:
                raise UserError(f"{where} has no field '{field}' (it has {', '.join(map(str, row))}): give data.field=")
            yield where, row if field is None else row[field]


def inside(begins: Sequence[int], spans_: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token begins inside one of the spans."""
    found, at = [], 0
    for place in begins:
        while at < len(spans_) and place >= spans_[at][1]:
            at += 1
        found.append(at < len(spans_) and place >= spans_[at][0])
    return found


def joined(part: Sequence[tuple[list[int], list[bool]]]) -> Sequences:
    """Ids, and whether each is learned, end to end."""
    return Sequences(
        np.array([i for ids, _ in part for i in ids], dtype=np.uint32),
        np.array([i for _, learned in part for i in learned], dtype=np.bool_),
        np.cumsum([0, *(len(ids) for ids, _ in part)], dtype=np.int64),
    )
