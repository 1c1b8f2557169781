"""Softmax attention. B rows, T positions, D model width, H query heads, G key/value heads, K head width.

Multi-head (Vaswani et al. 2017, arXiv:1706.03762), grouped-query (Ainslie et al. 2023, arXiv:2305.13245), sliding window
(Beltagy et al. 2020, arXiv:2004.05150), query/key normalisation (Henry et al. 2020, arXiv:2010.04245).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainkit.config import Count, Natural, config
from trainkit.models.kernels import Kernel, Mask, attend
from trainkit.models.layers import Linear
from trainkit.models.positions import rotate


@config
class Attention:
    """`kv_heads` under `heads` shares keys and values between groups of queries; `window` is how many positions back a
    query sees, itself included, but in `full_layers` (numbers from 0), which see all; `qk_norm` normalises queries and keys a
    head before they meet; `qkv_bias` says whether these have a bias where the rest of the model says otherwise. Where it is
    not `causal` a query sees what follows as well, a `window` of it on either side: an encoder's attention (Devlin et al.
    2019, arXiv:1810.04805)."""

    heads: Count
    kv_heads: Count | None = None
    head_width: Count | None = None
    window: Count | None = None
    qk_norm: bool = False
    full_layers: tuple[Natural, ...] = ()
    qkv_bias: bool | None = None
    causal: bool = True

    def shape(self, width: int) -> tuple[int, int, int]:
        """(H, G, K) in a model of this width.

        Raises:
            ValueError: the width or the heads do not divide.
        """
        groups = self.kv_heads or self.heads
        if self.heads % groups:
            raise ValueError(f"attention.heads={self.heads} is not a multiple of attention.kv_heads={groups}")
        if self.head_width is None and width % self.heads:
            raise ValueError(f"model.width={width} is not a multiple of attention.heads={self.heads}")
        return self.heads, groups, self.head_width or width // self.heads

    def parameters(self, width: int, bias: bool) -> int:
        """How many numbers one layer of it learns."""
        heads, groups, k = self.shape(width)
        into, out = (heads + 2 * groups) * k, heads * k
        of_qkv = bias if self.qkv_bias is None else self.qkv_bias
        return width * into + out * width + of_qkv * into + bias * width + 2 * k * self.qk_norm

    def window_of(self, layer: int) -> int | None:
        """How many positions back a query of this layer sees; None where it sees all."""
        return None if layer in self.full_layers else self.window


@dataclass
class Cache:
    """Keys and values (B, G, T, K) of the positions that one layer has seen: what a new position needs of the old."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions and give back all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class AttentionMixer(nn.Module):
    """`forward(x_BTD, mask, rope) -> y_BTD`. `mask` is what `attention_mask` gave; None is causal, and for a single
    new position everything before it; in an encoder it is everything. `elsewhere` adds keys and values (B, G, T, K)
    that other ranks have."""

    def __init__(self, cfg: Attention, width: int, bias: bool, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.k = cfg.shape(width)
        of_qkv = bias if cfg.qkv_bias is None else cfg.qkv_bias
        self.qkv = Linear(width, (self.heads + 2 * self.groups) * self.k, bias=of_qkv)
        self.out = Linear(self.heads * self.k, width, bias=bias)
        self.q_norm = nn.RMSNorm(self.k, eps=eps) if cfg.qk_norm else None
        self.k_norm = nn.RMSNorm(self.k, eps=eps) if cfg.qk_norm else None
        self.dropout, self.causal = dropout, cfg.causal
        self.elsewhere: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.window = cfg.window
        self.kernel: Kernel = "sdpa"

    def forward(self, x: Tensor, mask: Mask, rope: tuple[Tensor, Tensor] | None, cache: Cache | None = None) -> Tensor:
        parts = self.qkv(x).split([self.heads * self.k, self.groups * self.k, self.groups * self.k], dim=-1)
        q, k, v = (p.unflatten(-1, (-1, self.k)).transpose(1, 2) for p in parts)  # (B, H or G, T, K)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        elif self.elsewhere is not None:
            k, v = self.elsewhere(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, self.kernel, window=self.window, dropout=dropout, causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))
