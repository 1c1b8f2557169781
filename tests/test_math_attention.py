"""Attention by plain matrix products: `speed.attention=math`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.models import kernels
from trainkit.models.kernels import additive, attend, attention_mask

CPU = torch.device("cpu")
ROWS, LENGTH = 2, 40
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 27, [0] * 1 + [1] * 30 + [2] * 9], dtype=torch.int32)


def heads(groups: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(ROWS, n, LENGTH, 8, dtype=torch.float64, requires_grad=True) for n in (4, groups, groups)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("groups", [4, 2])
def test_whole_scores_are_made_piece_by_piece(
    causal: bool, documents: Tensor | None, window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values and gradients as torch's; no query of a causal piece meets keys behind the piece."""
    monkeypatch.setattr(kernels, "PIECE", 11)
    q, k, v = leaves = heads(groups)
    mask = additive(attention_mask(documents, LENGTH, LENGTH, window, CPU, causal=causal), leaves[0])
    ways = []
    kernel: Any
    for kernel in ("sdpa", "math"):
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=held: to.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            found = attend(q, k, v, mask, kernel, window=window, dropout=0.0, causal=causal)
        ways.append([found, *torch.autograd.grad(found.square().sum(), leaves)])
    torch.testing.assert_close(ways[1], ways[0], rtol=1e-9, atol=1e-9)
    queries = LENGTH // 3 if causal else LENGTH  # of the last piece, which meets all keys
    assert max(held) == ROWS * 4 * queries * LENGTH


def test_of_16_bits_weights_are_kept_once_and_gradients_stay_near() -> None:
    """In bf16 what is kept of scores is the weights that the product keeps, and gradients are as near to float64's as those
    of torch's softmax, which keeps float32 as well."""
    exact = heads()
    narrow = [x.detach().bfloat16().requires_grad_() for x in exact]
    upstream = torch.randn(exact[0].shape, dtype=torch.float64)
    held: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        if kept.numel() == ROWS * 4 * LENGTH * LENGTH:
            held[kept.data_ptr()] = kept.itemsize
        return kept

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return (
            scores.to(torch.promote_types(q.dtype, torch.float32))
            .masked_fill(ahead, -torch.inf)
            .softmax(-1)
            .to(q.dtype)
            @ v
        )

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        found = attend(*narrow, None, "math", window=None, dropout=0.0)
    assert list(held.values()) == [2]
    ours = torch.autograd.grad(found, narrow, upstream.bfloat16())
    theirs = torch.autograd.grad(torchs(*narrow), narrow, upstream.bfloat16())
    wanted = torch.autograd.grad(torchs(*exact), exact, upstream)
    for here, there, right in zip(ours, theirs, wanted, strict=True):
        assert (here - right).norm() < 1.1 * (there - right).norm()


def test_whole_scores_drop_out_and_leave_generation_to_torch() -> None:
    q, k, v = heads()
    torch.manual_seed(3)
    found = attend(q, k, v, None, "math", window=None, dropout=0.5)
    torch.manual_seed(3)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = (q @ k.mT / 8**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, F.dropout(weights, 0.5) @ v)
    last = attend(q[:, :, -1:], k, v, None, "math", window=None, dropout=0.0)
    torch.testing.assert_close(last[:, :, 0], attend(q, k, v, None, "sdpa", window=None, dropout=0.0)[:, :, -1])
