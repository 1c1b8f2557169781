"""Rows of a table: what is learned of one that several ids name is the same to the bit every time, compiled or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import weights
from trainkit.learner import Learner
from trainkit.models.foreign import ForeignBackbone
from trainkit.models.layers import look_up

V, D = 40, 384


@pytest.fixture
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)
    torch._dynamo.reset()


def learned(looked_up: Callable[[Tensor, Tensor], Tensor], ids: Tensor, table: Tensor, upstream: Tensor) -> Tensor:
    table = table.detach().requires_grad_()
    (looked_up(ids, table) * upstream).sum().backward()
    assert table.grad is not None
    return table.grad


@pytest.mark.parametrize("padding", [None, 3])
def test_a_compiled_gradient_is_the_plain_one_every_time(two_threads: None, padding: int | None) -> None:
    torch.manual_seed(0)
    ids, table, upstream = torch.randint(V, (8, 256)), torch.randn(V, D), torch.randn(8, 256, D)

    def here(ids: Tensor, table: Tensor) -> Tensor:
        return look_up(ids, table, padding)

    def torchs(ids: Tensor, table: Tensor) -> Tensor:
        return nn.functional.embedding(ids, table, padding)

    compiled, expected = torch.compile(here), learned(torchs, ids, table, upstream)
    assert torch.equal(compiled(ids, table), torchs(ids, table))
    for _ in range(20):
        assert torch.equal(learned(compiled, ids, table, upstream), expected)
    assert torch.equal(learned(here, ids, table, upstream), expected)
    assert (padding is None) == bool(expected[3].any())


@pytest.mark.parametrize("task", [(), ("task=mlm", "model.attention.causal=false", "evaluation.sample_tokens=0")])
def test_a_compiled_run_learns_the_same_bits_every_time(
    two_threads: None, learner: Callable[..., Learner], task: tuple[str, ...]
) -> None:
    words = ("compile=full", "model.width=256", "model.position=learned", "data.batch=32", *task)

    def after_three() -> Tensor:
        it = learner(*words)
        for _ in range(3):
            it.train_step()
        return weights(it)

    first = after_three()
    assert all(torch.equal(after_three(), first) for _ in range(2))


def test_a_model_of_transformers_looks_up_so_too(two_threads: None) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded, self.plain = nn.Embedding(V, D, padding_idx=3), nn.Embedding(V, D)

        def forward(self, ids: Tensor, upstream: Tensor) -> Tensor:
            return ((self.padded(ids) + self.plain(ids)) * upstream).sum()

    torch.manual_seed(0)
    inner: Any = Inner()
    ids, upstream = torch.randint(V, (8, 256)), torch.randn(8, 256, D)
    inner(ids, upstream).backward()
    expected = {name: p.grad for name, p in inner.named_parameters()}
    ForeignBackbone(inner)
    compiled = torch.compile(inner)
    for _ in range(10):
        inner.zero_grad()
        compiled(ids, upstream).backward()
        assert all(torch.equal(p.grad, expected[name]) for name, p in inner.named_parameters())
