"""The position-wise half of a block: GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), ReLU² (So et al. 2021,
arXiv:2109.08668), and the gated SwiGLU and GeGLU (Shazeer 2020, arXiv:2002.05202)."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.config import Count, config
from trainkit.models.layers import Linear

GATED = ("swiglu", "geglu")


@config
class MLP:
    """`hidden` null is the usual width: four times the model's, or for a gated one two thirds of that, which keeps the
    number of parameters, rounded up to a multiple of 64."""

    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"]
    hidden: Count | None = None

    def width(self, model_width: int) -> int:
        """The hidden width."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * model_width // 3 // 64) * 64 if self.activation in GATED else 4 * model_width

    def parameters(self, width: int, bias: bool) -> int:
        """How many numbers one layer of it learns."""
        hidden, into = self.width(width), 2 if self.activation in GATED else 1
        return (into + 1) * width * hidden + bias * (into * hidden + width)


class MLPBlock(nn.Module):
    """`forward(x_BTD) -> y_BTD`. A gated one makes gate and value by one matrix, the gate first."""

    def __init__(self, cfg: MLP, width: int, bias: bool) -> None:
        super().__init__()
        hidden = cfg.width(width)
        self.activation = cfg.activation
        self.into = Linear(width, hidden * (2 if cfg.activation in GATED else 1), bias=bias)
        self.out = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(activate(self.into(x), self.activation))


def activate(h: Tensor, activation: str) -> Tensor:
    """(..., hidden), or (..., 2 hidden) for a gated activation, to (..., hidden)."""
    match activation:
        case "gelu":
            return F.gelu(h)
        case "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        case "relu2":
            return F.relu(h).square()
    gate, value = h.chunk(2, -1)
    return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * value
