"""Writing with a language model, a token at a time. Top-p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751)."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.models.attention import Cache
from trainkit.tasks.causal_lm import evaluating


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
    stop: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Up to `tokens` ids that go on from `prompt`, each as soon as it is drawn; ends before any of the ids `stop`.

    Keys and values are cached, so that a new token costs one position. When `context` positions are full the older half
    is forgotten. The draw depends on `seed` alone and leaves torch's global generators as they are.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw from that many of the likeliest.
        top_p: draw from the likeliest that together reach this probability.

    Raises:
        UserError: there is no prompt to go on from.
    """
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for drawn in together(model, [prompt], tokens=tokens, context=context, seeds=[seed], stop=stop, **how):
        if drawn[0] is not None:
            yield drawn[0]


@torch.no_grad()
def together(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    context: int,
    seeds: Sequence[int],
    stop: int | Collection[int] | None = None,
    **how: Any,
) -> Iterator[list[int | None]]:
    """`generate` for several prompts at once: in each round one id a prompt, None once it has ended. What a prompt is given
    depends on its own seed and not on the others.

    Shorter prompts are filled up before their beginning, with what is another document to the model.

    Raises:
        UserError: a prompt is empty.
    """
    if not all(prompts):
        raise UserError("there is nothing to go on from: give a prompt of at least one token")
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    histories = [list(prompt)[-context:] for prompt in prompts]
    live = [True] * len(prompts)
    with evaluating(model):
        caches, fresh, documents, seen = _begun(model, histories, device)
        for _ in range(tokens):
            with _uncompiled():
                logits = model(fresh, documents=documents, caches=caches, seen=seen)[:, -1]
            seen += fresh.shape[1]
            drawn = [_draw(row, generator=g, **how) for row, g in zip(logits, generators, strict=True)]
            live = [is_live and token not in ends for is_live, token in zip(live, drawn, strict=True)]
            if not any(live):
                return
            yield [token if is_live else None for token, is_live in zip(drawn, live, strict=True)]
            histories = [[*history, token] for history, token in zip(histories, drawn, strict=True)]
            fresh = torch.tensor(drawn, device=device)[:, None]
            if documents is not None:
                documents = torch.cat([documents, documents[:, -1:]], 1)
            if seen >= context:
                histories = [history[-max(1, context // 2) :] for history in histories]
                caches, fresh, documents, seen = _begun(model, histories, device)


def _begun(
    model: nn.Module, histories: Sequence[Sequence[int]], device: torch.device
) -> tuple[Any, Tensor, Tensor | None, int]:
    """Empty caches, the histories as rows that end together, and which positions of them are no history's."""
    longest = max(map(len, histories))
    missing = [longest - len(history) for history in histories]
    rows = [[history[0]] * gap + list(history) for gap, history in zip(missing, histories, strict=True)]
    documents = None
    if any(missing):
        documents = (torch.arange(longest) >= torch.tensor(missing)[:, None]).int().to(device)
    return _caches(model), torch.tensor(rows, device=device), documents, 0


def _caches(model: nn.Module) -> Any:
    backbone: Any = model.backbone
    return backbone.caches() if hasattr(backbone, "caches") else [Cache() for _ in backbone.blocks]


def _uncompiled() -> AbstractContextManager[object]:
    """Lengths change with every token, and each would be compiled anew. Nothing is compiled if dynamo is not there."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _draw(
    logits: Tensor,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
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
