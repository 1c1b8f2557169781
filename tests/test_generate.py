"""Writing token by token against running the whole row again each time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_models import KINDS, model
from trainkit.errors import UserError
from trainkit.sampling import _until
from trainkit.tasks.generate import generate, together


def written(it: nn.Module, prompt: list[int] | None = None, **how: Any) -> list[int]:
    return list(generate(it, prompt or [1, 2, 3], **({"tokens": 20, "context": 32} | how)))


def uncached(it: nn.Module, history: list[int], count: int, context: int) -> Iterator[int]:
    """Greedy, each token from a whole row; a full context is cut to its newer half."""
    history = history[-context:]
    it.eval()
    for _ in range(count):
        token = int(it(torch.tensor([history]))[0, -1].argmax())
        yield token
        history = [*history, token]
        if len(history) > context:
            history = history[-max(1, context // 2) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "context"), [(3, 32), (3, 8), (50, 7), (1, 1), (2, 2)])
def test_the_cache_changes_nothing(kind: str, prompt: int, context: int) -> None:
    """Also where the context is full, the prompt longer than it, or nothing fits but the last token."""
    it = model(tied=False, **KINDS[kind])
    with torch.no_grad():  # else random weights say one token again and again
        it.backbone.embed.weight.mul_(5)  # type: ignore[operator, union-attr]
    ids = [(7 * i) % 40 for i in range(prompt)]
    found = written(it, ids, tokens=25, context=context, temperature=0)
    assert found == list(uncached(it, ids, 25, context))
    if context > 2 and kind != "gpt2":  # its random biases speak louder than what it reads
        assert len(set(found)) > 2  # a row of one token would hide mistakes


def test_each_token_costs_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    it, lengths, seen = model(), [], []
    real = it.backbone.forward  # type: ignore[union-attr]

    def counted(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return real(tokens, *args, **kwargs)  # type: ignore[operator]

    monkeypatch.setattr(it.backbone, "forward", counted)
    it.register_forward_hook(lambda *_: seen.append(_[2].shape[1]))
    written(it, tokens=10, context=8, temperature=0)
    assert lengths == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1]
    assert set(seen) == {1}  # the logits of the last position alone


def one(it: nn.Module, draws: int, **how: Any) -> torch.Tensor:
    first = [written(it, tokens=1, seed=s, **how)[0] for s in range(draws)]
    return torch.bincount(torch.tensor(first), minlength=40) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sharpens_and_flattens(temperature: float) -> None:
    it = model(tied=False)
    with torch.no_grad():
        it.backbone.head.weight.mul_(4)  # type: ignore[operator, union-attr]  # so that some are much likelier
    logits = it(torch.tensor([[1, 2, 3]]))[0, -1].detach()
    exact = (logits / temperature).softmax(0)
    drawn = one(it, 800, temperature=temperature)
    for other in (temperature / 2, temperature * 2):
        wrong = (logits / other).softmax(0)
        assert float((drawn - exact).abs().sum()) < 0.7 * float((drawn - wrong).abs().sum())


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    it = model()
    exact = (it(torch.tensor([[1, 2, 3]]))[0, -1].detach() / 3).softmax(0).sort(descending=True)
    few = one(it, 300, temperature=3.0, top_k=3)
    assert set(few.nonzero().flatten().tolist()) == set(exact.indices[:3].tolist())
    keep = 4
    p = float(exact.values[:keep].sum()) - 1e-6  # reached by the fourth, not by the third
    nucleus = one(it, 400, temperature=3.0, top_p=p)
    assert set(nucleus.nonzero().flatten().tolist()) == set(exact.indices[:keep].tolist())
    expected = exact.values[:keep] / exact.values[:keep].sum()
    assert float((nucleus[exact.indices[:keep]] - expected).abs().max()) < 0.1
    assert written(it, top_k=99, seed=1) == written(it, seed=1)


def test_an_abandoned_text_leaves_the_model_as_it_was() -> None:
    it = model(dropout=0.5)
    text = generate(it, [1], tokens=5, context=8)
    next(text)
    text.close()  # type: ignore[attr-defined]
    assert it.training


def test_there_must_be_a_prompt() -> None:
    with pytest.raises(UserError, match="at least one token"):
        list(generate(model(), [], tokens=1, context=8))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_compiled_model_writes_without_compiling() -> None:
    """Each length would be another graph."""
    graphs = []
    it = model()
    expected = written(it, temperature=0)
    torch._dynamo.reset()

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    it.compile(backend=backend)
    for block in it.backbone.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)  # type: ignore[operator]
    assert written(it, temperature=0) == expected
    assert not graphs
    it(torch.tensor([[1, 2, 3]]))
    assert graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_prompts_together_are_given_what_each_is_alone(kind: str, temperature: float) -> None:
    """Also where they have different lengths, end at different times and outgrow the context."""
    it = model(tied=False, **KINDS[kind])
    with torch.no_grad():
        it.backbone.embed.weight.mul_(5)  # type: ignore[operator, union-attr]
    prompts = [[(7 * i + n) % 40 for i in range(n)] for n in (1, 9, 4)]
    ends = {written(it, prompts[1], temperature=temperature, seed=6)[5]}
    how: dict[str, Any] = {"tokens": 18, "context": 32, "temperature": temperature, "stop": ends}
    rounds = list(together(it, prompts, seeds=[5, 6, 7], **how))
    found = [[row[i] for row in rounds if row[i] is not None] for i in range(3)]
    assert found == [written(it, prompt, seed=5 + i, **how) for i, prompt in enumerate(prompts)]
    assert len(found[1]) <= 5
    longer = list(together(it, prompts, seeds=[5, 6, 7], tokens=40, context=16, temperature=temperature))
    assert len(longer) == 40


@pytest.mark.parametrize(
    ("pieces", "ends", "expected"),
    [
        (["ab", "cd", "ef"], ["de"], ["ab", "c", ""]),
        (["a", "STO", "x"], ["STOP"], ["a", "", "STOx", ""]),
        (["a", "ST", "OPb"], ["STOP", "OP"], ["a", "", ""]),
        (["x\n", "\ny"], ["\n\n"], ["x", ""]),
        (["end"], ["nd!"], ["e", "nd"]),
    ],
)
def test_a_text_ends_before_what_ends_it(pieces: list[str], ends: list[str], expected: list[str]) -> None:
    assert list(_until(iter(pieces), ends)) == expected
