"""Where a token stands: positions that restart with each document, and rotary embeddings of them."""

import torch
from torch import Tensor


def positions_in(documents: Tensor) -> Tensor:
    """(B, T) int: each position's distance from the start of its document. `documents` (B, T) is non-decreasing."""
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


def rope_tables(positions: Tensor, k: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, K) of rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the
    half-split layout of GPT-NeoX and Llama. `positions` (T,) or (B, T) int; computed in float64, given in `dtype`."""
    frequencies = theta ** -(torch.arange(0, k, 2, device=positions.device, dtype=torch.float64) / k)
    angles = positions[..., None] * frequencies
    angles = torch.cat([angles, angles], -1)
    angles = angles[None, None] if positions.ndim == 1 else angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, H, T, K) turned by its position's angles, in its own dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
