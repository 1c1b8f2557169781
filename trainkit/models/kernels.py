"""Who sees whom in attention, and the kernels that compute it.

B rows, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Literal["sdpa", "flash", "flex", "math"]
PIECES, PIECE = 4, 128  # that queries are taken in: at most so many, each of at least so many positions
Mask = Any  # None (causal), a Tensor (B or 1, 1, T, S), bool or added to scores, or flex's BlockMask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    kernel: Kernel,
    *,
    window: int | None,
    dropout: float,
    causal: bool = True,
) -> Tensor:
    """Attention of queries (B, H, T, K) to keys and values (B, G, S, K): (B, H, T, K).

    Where `kernel` cannot do what is asked, which for flash is a mask of documents and for all a step of generation, it is
    torch's scaled_dot_product_attention.
    """
    shared = k.shape[1] != q.shape[1]
    if kernel == "flex" and mask is not None and not isinstance(mask, Tensor):
        out: Tensor = _flex()(q, k, v, block_mask=mask, enable_gqa=shared)
        return out
    if kernel == "flash" and mask is None and q.shape[2] == k.shape[2]:
        from flash_attn import flash_attn_func  # takes a second, and is not everywhere

        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        span = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
        found: Tensor = flash_attn_func(*heads_last, dropout_p=dropout, causal=causal, window_size=span)
        return found.transpose(1, 2)
    if kernel == "math" and q.shape[2] == k.shape[2]:
        return _by_products(q, k, v, mask, dropout, causal)
    if shared and mask is not None:  # with a mask, CUDA's fused kernels want a key head for each query head
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None and q.shape[2] > 1,
        dropout_p=dropout,
        enable_gqa=shared and mask is None,
    )


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, causal: bool) -> Tensor:
    """Attention by plain matrix products, all scores there at once but for a `causal` one's: its queries come in pieces,
    which do not meet the keys behind them. Products are in the inputs' format, what is between them in at least float32."""
    length, share = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
    pieces = max(1, min(PIECES, length // PIECE)) if causal else 1
    found, begin = [], 0
    for some in (q * q.shape[-1] ** -0.5).tensor_split(pieces, 2):
        end = begin + some.shape[2]
        seen = end if causal else length
        scores = some @ k[:, :, :seen].transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores + mask[:, :, begin:end, :seen]
        elif causal:
            place = torch.arange(seen, device=q.device)
            behind = torch.where(place[begin:end, None] >= place, 0.0, -torch.inf)  # added: a CPU reads a bool slowly
            scores = scores + behind.to(scores.dtype)
        weights = _Softmax.apply(scores, v.dtype)
        found.append((F.dropout(weights, dropout) if dropout else weights) @ v[:, :, :seen])
        begin = end
    return torch.cat(found, 2)


class _Softmax(torch.autograd.Function):
    """A softmax over the last dimension in the format of its scores, of which only what comes out in `dtype` is kept: the
    product that it goes into keeps that anyway. torch would keep it in both."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dtype: torch.dtype) -> Tensor:
        weights = scores.softmax(-1).to(dtype)
        ctx.save_for_backward(weights)
        ctx.wide = scores.dtype
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        wide = ctx.wide
        return torch.ops.aten._softmax_backward_data(upstream[0].to(wide), weights.to(wide), -1, wide), None


def attention_mask(
    documents: Tensor | None,
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
    kernel: Kernel = "sdpa",
    *,
    causal: bool = True,
) -> Mask:
    """Who sees whom: (B or 1, 1, queries, keys) bool, or None where the kernel knows it without: plain attention, causal or
    not, one query, a window in flash. For flex it is a BlockMask. A `window` that is not `causal` reaches to both sides.

    The queries are the last of the keys' positions. `documents` (B, T) int: positions of one document see each other.
    """
    if window is not None and window >= keys:
        window = None
    if documents is None and (window is None or (kernel == "flash" and queries == keys)) and queries in (1, keys):
        return None
    if kernel == "flex" and queries == keys:
        return _block_mask(documents, keys, window, device, causal)
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    mask = _seen(query, key, window, causal)
    if documents is None:
        return mask[None, None]
    return (mask & (documents[:, keys - queries :, None] == documents[:, None, :]))[:, None]


def additive(mask: Mask, like: Tensor) -> Mask:
    """A bool mask as what is added to scores, in the dtype that attention to `like` is computed in. torch's kernels would
    make this of it in every layer, and keep each."""
    if not isinstance(mask, Tensor):
        return mask
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _seen(query: Tensor, key: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether a query sees a key, by their places."""
    span = 1 << 30 if window is None else window
    return (key > query - span) & (key <= query if causal else key < query + span)


def _block_mask(documents: Tensor | None, length: int, window: int | None, device: torch.device, causal: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = _seen(query, key, window, causal)
        return seen if documents is None else seen & (documents[row, query] == documents[row, key])

    rows = None if documents is None else len(documents)
    return create_block_mask(visible, rows, None, length, length, device=str(device))


@cache
def _flex() -> Any:
    """FlexAttention as a kernel. Left uncompiled it would hold all scores at once."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
