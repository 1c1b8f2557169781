"""Adapters: a few numbers that learn beside a model that does not (in = width of a layer's input, out = of its output).

LoRA (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, with A (rank, in) and B (out, rank), B zero at first. DoRA (Liu
et al. 2024, arXiv:2402.09353): the length of each of its rows is learned on its own. QLoRA (Dettmers et al. 2023,
arXiv:2305.14314): W is frozen in 4 bits.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.config import Count, Fraction, Positive, config
from trainkit.errors import UserError
from trainkit.models.quantized import Format, FrozenLinear, decode, encode


@config
class Adapter:
    """`targets`: the linear layers of `attention`, of the `mlp`, or `all` of a block's. `quantize`: what their frozen weights
    are held in; `double_quantize` takes the scales of 4 bits from 0.5 to 0.13 bits a number."""

    kind: Literal["lora", "dora"]
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    targets: Literal["all", "attention", "mlp"] = "all"
    quantize: Format | None = None
    double_quantize: bool = False

    def __post_init__(self) -> None:
        if self.double_quantize and self.quantize not in ("nf4", "int4"):
            raise ValueError("model.adapter.double_quantize is of 4-bit weights: it needs model.adapter.quantize=nf4")

    def apply(self, backbone: nn.Module) -> nn.Module:
        """`backbone`, in place: frozen, with an adapter beside every target. Their first factors are drawn from torch's
        global generator."""
        backbone.requires_grad_(False)
        found = 0
        for block in backbone.blocks:  # type: ignore[union-attr]  # a ModuleList
            layers = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
            for name, linear in layers:
                part = "attention" if "attention" in name or "attn" in name else "mlp"
                if self.targets in ("all", part):
                    parent, _, own = name.rpartition(".")
                    setattr(block.get_submodule(parent), own, AdaptedLinear(linear, self))
                    found += 1
        if not found:
            raise UserError(
                f"this model's blocks have no linear layers in which model.adapter.targets={self.targets} could be"
            )
        return backbone

    def trained(self, into: int, out: int) -> int:
        """How many numbers it learns beside one layer."""
        return self.rank * (into + out) + out * (self.kind == "dora")


class AdaptedLinear(FrozenLinear):
    """A frozen linear layer and its adapter: `lora_a` (rank, in), `lora_b` (out, rank) and, for DoRA, `magnitude` (out,)."""

    def __init__(self, linear: nn.Linear, cfg: Adapter) -> None:
        super().__init__(linear, cfg.quantize, cfg.double_quantize)
        out, into = linear.weight.shape
        self.scale = cfg.alpha / cfg.rank
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, into))
        self.lora_b = nn.Parameter(torch.zeros(out, cfg.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()
        self.asleep = False
        self.magnitude = nn.Parameter(_lengths(self.whole(torch.float32))) if cfg.kind == "dora" else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.asleep:
            return y
        low = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b) * self.scale
        if self.magnitude is None:
            return y + low
        # a gradient does not flow through the length, as the paper says; at first the ratio is 1 and y stays to the bit
        ratio = self.magnitude / self.lengths().to(self.magnitude.dtype)
        product = y if self.bias is None else y - self.bias.to(y.dtype)
        return y + ((ratio - 1) * product + ratio * low).to(y.dtype)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The length of each row of W + (alpha / rank) B A, in at least float32."""
        return _lengths(self.whole(self.lora_b.dtype) + self.scale * self.lora_b @ self.lora_a)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight (out, in) of a plain layer that computes the same, in at least float32."""
        wide = torch.promote_types(self.lora_b.dtype, torch.float32)
        weight = self.whole(wide) + self.scale * self.lora_b.to(wide) @ self.lora_a.to(wide)
        if self.magnitude is None:
            return weight
        return weight * (self.magnitude.to(wide) / _lengths(weight))[:, None]

    @torch.no_grad()
    def adopt(self, weight: Tensor | None) -> None:
        """Take a base's `weight` (out, in), whole, before anything was learned; None where it was read into its place, which
        it can be where it is not quantized."""
        if self.form is None:
            lengths = _lengths(self.held[0].to(self.lora_b.dtype))
        else:
            assert weight is not None
            tensors = encode(weight.to(self.held[0].device), self.form, self.doubly)
            tensors = {name: tensor.to(getattr(self, name).dtype) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                fill(getattr(self, name), tensor)
            lengths = _lengths(decode(list(tensors.values()), self.pairs, self.shape, self.lora_b.dtype))
        if self.magnitude is not None:
            fill(self.magnitude, lengths)


def adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers of `model` with an adapter, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


@contextmanager
def asleep(model: nn.Module) -> Iterator[None]:
    """`model` as it is without its adapters."""
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer.asleep = True
    try:
        yield
    finally:
        for layer in layers:
            layer.asleep = False


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same: theirs are added to the weights."""
    layers = dict(adapted(model))
    plain = {f"{name}.weight": layer.merged() for name, layer in layers.items()}
    inside = {f"{name}.{own}" for name, layer in layers.items() for own in layer.state_dict() if own != "bias"}
    rest: Mapping[str, Tensor] = model.state_dict()
    return plain | {name: tensor for name, tensor in rest.items() if name not in inside}


def _lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


def fill(place: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one of which this rank may hold a slice."""
    if hasattr(place, "placements") and not hasattr(whole, "placements"):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None)  # type: ignore[attr-defined]
    place.copy_(whole)
