"""Where a token stands: positions that restart with each document, and rotary embeddings of them."""

import math
from typing import Literal

import torch
from torch import Tensor

from trainkit.config import Count, Positive, config


@config
class RopeScaling:
    """How a model was taught positions beyond those it was first trained on: `linear` divides all positions by `factor`
    (Chen et al. 2023, arXiv:2306.15595); `llama3` only what turns less than `low` times in `original` positions, and not
    what turns more than `high` times (Grattafiori et al. 2024, arXiv:2407.21783); `yarn` likewise, between pairs of numbers,
    and makes the angles' cosines larger by `attention` (Peng et al. 2023, arXiv:2309.00071; null: what the paper says)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: Positive
    original: Count = 8192
    low: Positive = 1.0
    high: Positive = 4.0
    attention: Positive | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"model.rope_scaling.low={self.low} has to be under model.rope_scaling.high={self.high}")

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """The frequencies (K / 2,) as they are to be used."""
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            turns = self.original * frequencies / (2 * math.pi)
            kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            pairs = len(frequencies)
            low, high = (
                pairs * math.log(self.original / (n * 2 * math.pi)) / math.log(theta) for n in (self.high, self.low)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * pairs - 1)
            place = torch.arange(pairs, device=frequencies.device, dtype=frequencies.dtype)
            kept = 1 - ((place - low) / max(high - low, 1e-3)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    @property
    def magnitude(self) -> float:
        """By how much cosines and sines are larger."""
        if self.kind != "yarn":
            return 1.0
        return self.attention or (0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)


def positions_in(documents: Tensor) -> Tensor:
    """(B, T) int: each position's distance from the start of its document. `documents` (B, T) is non-decreasing."""
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


def rope_tables(
    positions: Tensor, k: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, K) of rotary position embeddings (Su et al. 2021, arXiv:2104.09864), in the
    half-split layout of GPT-NeoX and Llama. `positions` (T,) or (B, T) int; computed in float64, given in `dtype`."""
    frequencies = theta ** -(torch.arange(0, k, 2, device=positions.device, dtype=torch.float64) / k)
    if scaling is not None:
        frequencies = scaling.apply(frequencies, theta)
    angles = positions[..., None] * frequencies
    angles = torch.cat([angles, angles], -1)
    angles = angles[None, None] if positions.ndim == 1 else angles[:, None]
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, H, T, K) turned by its position's angles, in its own dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
