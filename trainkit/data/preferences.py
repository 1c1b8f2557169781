"""Pairs of answers, one preferred to the other: JSON lines or a Hugging Face data set of `prompt`, `chosen` and `rejected`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainkit.config import config
from trainkit.data import templates
from trainkit.data.chat import Chat, ChatCorpus, inside, joined, marked, values
from trainkit.data.loader import Loader
from trainkit.data.packing import PackedRows, Sequences
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError


@dataclass
class Pairs:
    """The chosen and the rejected answers, each after its prompt, in one order."""

    chosen: Sequences
    rejected: Sequences

    @property
    def tokens(self) -> int:
        return self.chosen.tokens + self.rejected.tokens


@config
class Preferences(Chat):
    """A line has a `prompt` (a text or messages), and `chosen` and `rejected` (texts, or messages, which without a prompt are
    the whole conversation). Learned is the last answer of each."""

    gives: ClassVar[str] = "preferences"
    kind: Literal["preferences"] = "preferences"  # type: ignore[assignment]  # another word for other data

    def open(self, report: Any = None) -> ChatCorpus:
        """The pairs as tokens.

        Raises:
            UserError: a line is no pair, or the template cannot write one.
        """
        assert self.path is not None
        tokenizer = self.tokenizer.build(list)
        template, every = self._template(tokenizer), round(1 / self.validation)
        parts: list[list[tuple[list[int], list[bool]]]] = [[], [], [], []]
        for number, (where, row) in enumerate(values(self.path, None)):
            held_out = 2 * (number % every == every // 2)
            for side, name in enumerate(("chosen", "rejected")):
                parts[held_out + side].append(_answer(where, row, name, tokenizer, template))
        if not parts[2] and len(parts[0]) > 1:
            parts[2].append(parts[0].pop())
            parts[3].append(parts[1].pop())
        if not parts[0] or not parts[2]:
            raise UserError(f"{self.path} holds no two pairs")
        train, held = Pairs(joined(parts[0]), joined(parts[1])), Pairs(joined(parts[2]), joined(parts[3]))
        digest = hashlib.sha256(json.dumps(tokenizer.identity).encode())
        for part in (train.chosen, train.rejected, held.chosen, held.rejected):
            for array in (part.ids, part.learned, part.begins):
                digest.update(array.tobytes())
        return ChatCorpus(self.path.rpartition("/")[2], tokenizer, train, held, digest.hexdigest())

    def build(self, corpus: ChatCorpus, *, seed: int, ranks: Any, device: torch.device) -> Loader:
        """A loader of this rank's share of the batches.

        Raises:
            UserError: the batch does not divide over the ranks.
        """
        sizes, eos = corpus.tokenizer.token_bytes(), corpus.tokenizer.eos
        train, held = (
            PairedRows(
                *(PackedRows(s, sizes, eos, self.length, seed, pack=False) for s in (part.chosen, part.rejected))
            )
            for part in (corpus.train, corpus.validation)
        )
        return Loader(train, held, batch=self.batch, workers=self.workers, ranks=ranks, device=device)


class PairedRows:
    """Rows of the chosen answers, and under `rejected_tokens` and `rejected_labels` those of the others."""

    def __init__(self, chosen: PackedRows, rejected: PackedRows) -> None:
        self._chosen, self._rejected = chosen, rejected
        self.length, self.sizes, self.splits = chosen.length, chosen.sizes, chosen.splits

    def shuffled(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample ids at these places of the endless training order."""
        return self._chosen.shuffled(positions)

    def batch(self, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """The pairs of these samples; an id of -1 is an empty one."""
        others = self._rejected.batch(ids)
        more = {f"rejected_{name}": others[name] for name in ("tokens", "labels")}
        return self._chosen.batch(ids) | more


def _answer(
    where: str, row: Mapping[str, Any], name: str, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[bool]]:
    """The ids of a prompt and one of its answers, and which of them are the answer's."""
    before, said = row.get("prompt") or [], row.get(name)
    messages = [{"role": "user", "content": before}] if isinstance(before, str) else list(before)
    messages += [{"role": "assistant", "content": said}] if isinstance(said, str) else list(said or [])
    if len(messages) < 2 or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise UserError(f"{where} is no pair: it needs a prompt, a chosen and a rejected, each a text or messages")
    try:
        text, spans = templates.with_spans(template, getattr(tokenizer, "words", {}), messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    ids, begins = marked(tokenizer, text)
    return ids, inside(begins, spans[-1:])
