"""Writing with a language model, a token at a time. Top-p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751)."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.models.attention import Cache


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Up to `tokens` ids that go on from `prompt`, each as soon as it is drawn; ends before the id `stop`.

    Keys and values are cached, so that a new token costs one position. When `context` positions are full the older half
    is forgotten. The draw depends on `seed` alone and leaves torch's global generators as they are.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw from that many of the likeliest.
        top_p: draw from the likeliest that together reach this probability.

    Raises:
        UserError: there is no prompt to go on from.
    """
    if not prompt:
        raise UserError("there is nothing to go on from: give a prompt of at least one token")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    history = list(prompt)[-context:]
    training = model.training
    model.eval()
    try:
        caches, fresh = _caches(model), history
        for _ in range(tokens):
            seen = len(history) - len(fresh)
            new = torch.tensor([fresh], device=device)
            with _uncompiled():
                logits = model(new, caches=caches, seen=seen)[0, -1]
            token = _draw(logits, temperature, top_k, top_p, generator)
            if token == stop:
                return
            yield token
            history, fresh = [*history, token], [token]
            if len(history) > context:
                history = history[-max(1, context // 2) :]
                caches, fresh = _caches(model), history
    finally:
        model.train(training)


def _caches(model: nn.Module) -> Any:
    backbone: Any = model.backbone
    return backbone.caches() if hasattr(backbone, "caches") else [Cache() for _ in backbone.blocks]


def _uncompiled() -> AbstractContextManager[object]:
    """Lengths change with every token, and each would be compiled anew. Nothing is compiled if dynamo is not there."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered > top_p  # the first one always stays
        probabilities = probabilities.scatter(0, index, ordered.masked_fill(beyond, 0))
    return int(torch.multinomial(probabilities, 1, generator=generator))
