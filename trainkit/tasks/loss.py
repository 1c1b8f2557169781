"""The sum of cross-entropies over a vocabulary, from hidden states: N tokens, D model width, V vocabulary.

For a large vocabulary the logits are the largest tensor of a step. Here they are made chunk by chunk in one buffer, and
each chunk's gradient is taken while its probabilities are at hand, so that (N, V) never exists and nothing is computed
twice. The idea of taking the gradient in the forward pass is Liger's (Hsu et al. 2024, arXiv:2410.10989).
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
WHOLE = 1 << 22  # logits up to here (16 MiB in float32) are made at once: there is little memory to save
CHUNK = 1 << 25  # logits of a chunk, 128 MiB in float32: smaller ones make the matrix products thin and slow
BLOCK: int | None = (
    1 << 21
)  # of them that what follows a product goes over at once on a CPU, so that its cache holds them


class Vocabulary(Protocol):
    """The ranks that each have a part of the head: the ids from `begin` on."""

    begin: int

    def sum(self, x: Tensor) -> Tensor:
        """Over those ranks."""

    def largest(self, x: Tensor) -> Tensor:
        """Over those ranks."""


def summed_loss(
    hidden: Tensor,
    unembed: Tensor,
    labels: Tensor,
    fused: Literal["auto", "on", "off"] = "auto",
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """The sum of the losses of the labels that are not -100, a float32 scalar (float64 if `hidden` is).

    Args:
        hidden: (..., D), any float dtype.
        unembed: (V, D).
        labels: (...) int64.
        fused: whether it is made in chunks (on), from whole logits (off), or in chunks where they are large (auto).
        vocabulary: `unembed` is this rank's part of it, and the loss is made in chunks. Every rank has the whole loss, and
            the gradient that its part gives `hidden`.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if vocabulary is not None:
        fused = "on"
    if fused == "off" or (fused == "auto" and hidden.shape[0] * unembed.shape[0] <= WHOLE):
        logits = F.linear(hidden, unembed)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if not torch.is_grad_enabled():
        return _in_chunks(hidden, unembed, labels, dtype, (False, False), vocabulary)[0]
    loss: Tensor = _ChunkedLoss.apply(hidden, unembed, labels, dtype, vocabulary)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembed: Tensor, labels: Tensor, dtype: torch.dtype, vocabulary: Vocabulary | None
    ) -> Tensor:
        total, *grads = _in_chunks(hidden, unembed, labels, dtype, ctx.needs_input_grad[:2], vocabulary)
        ctx.save_for_backward(*grads)
        ctx.dtypes = hidden.dtype, unembed.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        of_hidden, of_unembed = (
            None if grad is None else (grad.to(upstream[0].dtype) * upstream[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, of_unembed, None, None, None


def _in_chunks(
    hidden: Tensor,
    unembed: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    vocabulary: Vocabulary | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients by `hidden` and by `unembed` where they are wanted.

    Matrix products are in `dtype`, everything else in at least float32: also the gradients, which a float16 scaler has
    not made large yet. The buffers are written over by every chunk, because on a CPU fresh memory costs more than
    the arithmetic on it. With 16 bits a chunk has twice the rows there: little of it is ever wide.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    h, w = hidden.to(dtype), unembed.to(dtype)
    if torch.compiler.is_compiling() and vocabulary is None:
        return _for_a_compiler(h, w, labels, wide, wanted)
    in_cache = BLOCK is not None and h.device.type == "cpu" and vocabulary is None
    numbers = CHUNK * wide.itemsize // dtype.itemsize if in_cache else CHUNK
    chunks = -(-len(h) * len(w) // numbers)
    rows = max(1, -(-len(h) // chunks))  # equal chunks: a thin last one would be slow
    block = min(rows, max(1, BLOCK // len(w))) if in_cache and BLOCK else rows
    total = torch.zeros((), dtype=wide, device=h.device)
    by_hidden = torch.empty(h.shape, dtype=wide, device=h.device) if wanted[0] else None
    by_unembed = torch.empty(w.shape, dtype=wide, device=h.device) if wanted[1] else None
    buffer = torch.empty(rows, len(w), dtype=dtype, device=h.device)
    wide_buffer = None if dtype == wide else torch.empty(block, len(w), dtype=wide, device=h.device)
    narrow_sum = torch.empty_like(w) if wanted[1] and dtype != wide else None
    for begin in range(0, len(h), rows):
        some, y = h[begin : begin + rows], labels[begin : begin + rows, None]
        logits = torch.mm(some, w.T, out=buffer[: len(some)])
        for at in _begins(len(some), block):
            part = logits[at : at + block]
            total += _to_gradient(part, y[at : at + block], wide_buffer, vocabulary, any(wanted))
        if by_hidden is not None:
            by_hidden[begin : begin + rows] = logits @ w
        if by_unembed is None:
            continue
        if narrow_sum is not None:
            of_some = torch.mm(logits.T, some, out=narrow_sum)
            by_unembed.copy_(of_some) if begin == 0 else by_unembed.add_(of_some)
        elif begin == 0:
            torch.mm(logits.T, some, out=by_unembed)
        else:
            by_unembed.addmm_(logits.T, some)
    return total, by_hidden, by_unembed


def _to_gradient(
    logits: Tensor, y: Tensor, wide_buffer: Tensor | None, vocabulary: Vocabulary | None, wanted: bool
) -> Tensor:
    """The sum of the losses of some rows, whose gradient is written over their logits if it is `wanted`. A `wide_buffer` is
    what is computed in, where logits have fewer bits."""
    wide = logits if wide_buffer is None else wide_buffer[: len(logits)].copy_(logits)
    valid = here = y != IGNORED
    if vocabulary is not None:
        y = y - vocabulary.begin
        here = (y >= 0) & (y < logits.shape[1]) & valid
    y = torch.where(here, y, 0)
    largest, of_label = wide.amax(1, keepdim=True), wide.gather(1, y)
    if vocabulary is not None:
        largest, of_label = vocabulary.largest(largest), vocabulary.sum(of_label * here)
    powers = wide.sub_(largest).exp_()
    normaliser = powers.sum(1, keepdim=True)
    if vocabulary is not None:
        normaliser = vocabulary.sum(normaliser)
    if wanted:
        grad = powers.mul_(valid / normaliser).scatter_add_(1, y, -here.to(wide.dtype))
        if wide_buffer is not None:
            logits.copy_(grad)
    return ((normaliser.log() + largest - of_label) * valid).sum()


def _begins(count: int, size: int) -> range:
    """Where blocks of `size` rows begin."""
    return range(0, count, size)


def _for_a_compiler(
    h: Tensor, w: Tensor, labels: Tensor, wide: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same without buffers of its own: a compiler makes one kernel of all that happens to a chunk's logits, which it
    reads and writes in the format of the products. So with 16 bits a chunk has twice the rows. A gradient that one chunk
    gives whole stays in that format."""
    chunks = -(-len(h) * len(w) * h.itemsize // (CHUNK * wide.itemsize))
    total = torch.zeros((), dtype=wide, device=h.device)
    by_hidden: list[Tensor] = []
    by_unembed: Tensor | None = None
    across = w.T  # a CPU multiplies 16 bits faster so, and the cast to them may write it in any order
    if h.device.type == "cpu" and h.dtype.itemsize == 2:
        across = across.contiguous()
    for some, y in zip(h.tensor_split(chunks), labels[:, None].tensor_split(chunks), strict=True):
        logits = (some @ across).to(wide)
        valid = y != IGNORED
        y = torch.where(valid, y, 0)
        largest, of_label = logits.amax(1, keepdim=True), logits.gather(1, y)
        powers = (logits - largest).exp()
        normaliser = powers.sum(1, keepdim=True)
        total += ((normaliser.log() + largest - of_label) * valid).sum()
        share = valid / normaliser
        of_its_label = ((of_label - largest).exp() * share - valid.to(wide)).to(h.dtype)
        grad = (powers * share).to(h.dtype).scatter(1, y, of_its_label)  # one column a row, and no comparison of all
        if wanted[0]:
            by_hidden.append(grad @ across.T)
        if wanted[1]:
            of_some = grad.T @ some
            by_unembed = of_some if by_unembed is None else by_unembed.to(wide) + of_some
    return total, torch.cat(by_hidden) if wanted[0] else None, by_unembed
