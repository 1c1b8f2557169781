"""Text from a model, as it comes."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from trainkit.tasks.generate import generate, together

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no character yet


def stream(
    model: nn.Module, tokenizer: Any, prompt: str | Sequence[int], *, until: Sequence[str] = (), **how: Any
) -> Iterator[str]:
    """The pieces of text that `model` goes on from `prompt`, a text or ids, with; `how` is what `generate` takes. A
    character is given when all its tokens are there, and what may begin one of the texts `until` when it does not: they end
    it."""
    ids = _ids(tokenizer, prompt)
    pieces = _pieces(tokenizer, generate(model, ids, stop=tokenizer.eos, **how))
    return _until(pieces, until) if until else pieces


def texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    seed: int = 0,
    until: Sequence[str] = (),
    **how: Any,
) -> list[str]:
    """What `model` goes on from each of several prompts with, all at once."""
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    seeds = [seed + i for i in range(len(ids))]
    backbone: Any = model.backbone
    if hasattr(backbone, "caches"):  # another's model, which knows no documents where it generates
        rounds = [list(generate(model, i, stop=tokenizer.eos, seed=s, **how)) for i, s in zip(ids, seeds, strict=True)]
    else:
        rounds = [[] for _ in ids]
        for drawn in together(model, ids, stop=tokenizer.eos, seeds=seeds, **how):
            for given, token in zip(rounds, drawn, strict=True):
                given.extend([] if token is None else [token])
    return ["".join(_until(iter([tokenizer.decode(given)]), until)) for given in rounds]


def _ids(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
    return ids or [tokenizer.eos]


def _pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    given: list[int] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(given + pending)[len(tokenizer.decode(given)) :]
        if not text.endswith(UNFINISHED):
            yield text
            given, pending = pending, []
    if pending:
        yield tokenizer.decode(pending)


def _until(pieces: Iterator[str], ends: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the `ends`; what could be the beginning of one is held back until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        places = [place for end in ends if (place := held.find(end)) >= 0]
        if places:
            yield held[: min(places)]
            return
        keep = max((n for end in ends for n in range(len(end)) if held.endswith(end[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held
