"""Text from a model, as it comes."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from trainkit.tasks.generate import generate

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no character yet


def stream(model: nn.Module, tokenizer: Any, prompt: str, **how: Any) -> Iterator[str]:
    """The pieces of text that `model` goes on from `prompt` with; `how` is what `generate` takes. A character is given
    when all its tokens are there."""
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos]
    given: list[int] = []
    pending: list[int] = []
    for token in generate(model, ids, stop=tokenizer.eos, **how):
        pending.append(token)
        text = tokenizer.decode(given + pending)[len(tokenizer.decode(given)) :]
        if not text.endswith(UNFINISHED):
            yield text
            given, pending = pending, []
    if pending:
        yield tokenizer.decode(pending)
