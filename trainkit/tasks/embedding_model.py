"""One vector a text, from the hidden states of a backbone. B texts, T positions, D model width, K vector width.

A mean, the first position (Devlin et al. 2019, arXiv:1810.04805) or the last (Wang et al. 2024, arXiv:2401.00368), over
real positions only.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.models.layers import Linear

Pooling = Literal["mean", "cls", "last"]
LARGEST_SCALE = 100.0  # of a learned temperature (Radford et al. 2021, arXiv:2103.00020)


class EmbeddingModel(nn.Module):
    """`forward(tokens_BT, lengths_B) -> vectors_BK`, each of length 1, in at least float32.

    Rows are padded on the right: no position sees what is behind its row's length, nor does the pooling. With a learned
    temperature the vectors have length `scale ** 0.5`, so that their products are divided by it already and its
    gradient comes with theirs, however they are split over microbatches and ranks.
    """

    def __init__(self, backbone: nn.Module, pooling: Pooling, width: int | None, scale: float | None) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        into = int(backbone.cfg.width)  # type: ignore[union-attr, arg-type]  # a backbone knows its shape
        self.causal = bool(backbone.cfg.attention.causal)  # type: ignore[union-attr]
        self.projection = Linear(into, width, bias=False) if width is not None else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=into**-0.5)
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)])) if scale is not None else None

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        padded = (torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]).int()
        # behind a causal model's texts there is nothing to hide; an encoder takes the padding for another document
        hidden = self.backbone(tokens, None if self.causal else padded)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        match self.pooling:
            case "mean":
                weights = (1 - padded).to(wide)[..., None]
                pooled = (hidden.to(wide) * weights).sum(1) / weights.sum(1)
            case "cls":
                pooled = hidden[:, 0].to(wide)
            case "last":
                pooled = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1].to(wide)
        if self.projection is not None:
            pooled = self.projection(pooled).to(wide)
        vectors = F.normalize(pooled, dim=-1)
        if self.log_scale is None:
            return vectors
        return vectors * (self.log_scale.to(wide).clamp(max=math.log(LARGEST_SCALE)) / 2).exp()
