"""The sum of cross-entropies over a vocabulary, from hidden states: N tokens, D model width, V vocabulary.

For a large vocabulary the logits are the largest tensor of a step. Here they are made chunk by chunk, and each chunk's
gradient is taken while its logits are at hand, so that (N, V) never exists and nothing is computed twice. The idea of
taking the gradient in the forward pass is Liger's (Hsu et al. 2024, arXiv:2410.10989).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
SMALL_VOCABULARY = 4096  # up to here whole logits are cheap and one large product is faster (docs/benchmarks/loss.md)
CHUNK_NUMBERS = 1 << 24  # logits of a chunk: 64 MiB in float32


def summed_loss(hidden: Tensor, unembed: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of the labels that are not -100, a float32 scalar (float64 if `hidden` is).

    Args:
        hidden: (..., D), any float dtype.
        unembed: (V, D).
        labels: (...) int64.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if unembed.shape[0] <= SMALL_VOCABULARY or not torch.is_grad_enabled():
        chunk = max(1, CHUNK_NUMBERS // unembed.shape[0])
        if hidden.shape[0] <= chunk or torch.is_grad_enabled():
            return _plain(hidden, unembed, labels)
        pairs = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        return torch.stack([_plain(h, unembed, y) for h, y in pairs]).sum()
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    loss: Tensor = _ChunkedLoss.apply(hidden, unembed, labels, dtype or hidden.dtype)
    return loss


def _plain(hidden: Tensor, unembed: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, unembed)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """Matrix products in `dtype`, everything else in at least float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, unembed: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        h, w = hidden.to(dtype), unembed.to(dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        grad_unembed = torch.zeros(unembed.shape, dtype=wide, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = max(1, CHUNK_NUMBERS // unembed.shape[0])
        for begin in range(0, h.shape[0], rows):
            here = slice(begin, begin + rows)
            logits = (h[here] @ w.T).to(wide)
            valid = labels[here] != IGNORED
            target = torch.where(valid, labels[here], 0)[:, None]
            log_normaliser = logits.logsumexp(1, keepdim=True)
            total += ((log_normaliser - logits.gather(1, target))[:, 0] * valid).sum()
            grad = logits.sub_(log_normaliser).exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            narrow = grad.mul_(valid[:, None]).to(dtype)
            grad_hidden[here] = narrow @ w
            grad_unembed += narrow.T @ h[here]
        ctx.save_for_backward(grad_hidden, grad_unembed)
        ctx.dtypes = hidden.dtype, unembed.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_unembed = ctx.saved_tensors
        upstream = grads[0]
        return (grad_hidden * upstream).to(ctx.dtypes[0]), (grad_unembed * upstream).to(ctx.dtypes[1]), None, None
