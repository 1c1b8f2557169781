"""Writing with a language model, a token at a time. Top-p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

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
    """
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
            logits = model(new, caches=caches, seen=seen)[0, -1].float()
            token = _draw(logits, temperature, top_k, top_p, generator)
            if token == stop:
                return
            yield token
            history, fresh = [*history, token], [token]
            if len(history) > context:
                history = history[-(context // 2) :]
                caches, fresh = _caches(model), history
    finally:
        model.train(training)


def _caches(model: nn.Module) -> list[Cache]:
    return [Cache() for _ in model.backbone.blocks]  # type: ignore[union-attr]  # a task's model has a backbone of blocks


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered > top_p  # the first one always stays
        probabilities = probabilities.scatter(0, index, ordered.masked_fill(beyond, 0))
    return int(torch.multinomial(probabilities, 1, generator=generator))
