"""Models that make vectors: what they see, and what is pooled."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.test_embedding import N, batch, model, vectors
from trainkit.models.kernels import attention_mask
from trainkit.tasks import Embedding


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_is_not_seen(pooling: Any, causal: bool) -> None:
    task, data = Embedding(pooling=pooling, projection=6), batch()
    it = model(task, causal=causal)
    alone = vectors(it, data)
    for column in range(3):
        tokens = F.pad(data[f"tokens{column}"], (0, 5), value=7)
        torch.testing.assert_close(it(tokens, data["lengths"][:, column]), alone[:, column], rtol=1e-11, atol=1e-13)
    assert alone.shape == (N, 3, 6)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(N, 3, dtype=torch.float64))


def test_an_encoder_sees_both_ways_and_a_decoder_does_not() -> None:
    for causal in (False, True):
        it = model(Embedding(pooling="cls"), causal=causal)
        one, two = (it(torch.tensor([[1, 2, last]]), torch.tensor([3])) for last in (3, 4))
        assert torch.equal(one, two) == causal


@pytest.mark.parametrize("window", [None, 1, 3])
def test_an_encoder_sees_a_window_on_both_sides(window: int | None) -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    for of in (documents, None):
        mask = attention_mask(of, 7, 7, window, torch.device("cpu"), causal=False)
        for q in range(7):
            for k in range(7):
                near = window is None or abs(q - k) < window
                expected = near and (of is None or bool(of[0, q] == of[0, k]))
                assert mask is None or bool(mask[0, 0, q, k]) == expected
        assert (mask is None) == (of is None and window is None)


def test_pooling_takes_what_it_says() -> None:
    tokens, lengths = torch.tensor([[1, 2, 3, 9]]), torch.tensor([3])
    it = model(Embedding(pooling="mean"), depth=0, norm="none", position="none")
    table = it.backbone.embed.weight  # type: ignore[union-attr]
    for pooling, expected in {"mean": table[1] + table[2] + table[3], "cls": table[1], "last": table[3]}.items():
        it.pooling = pooling  # type: ignore[assignment]
        torch.testing.assert_close(it(tokens, lengths)[0], expected / expected.norm(), rtol=1e-12, atol=0)  # type: ignore[operator]
