"""Linear layers whose weight is frozen, as it is or in 8 or 4 bits, and made whole again each time it is used.

- `int8`: one scale a row.
- `nf4`: 16 values at the quantiles of a normal distribution, and a scale for every 64 numbers (Dettmers et al. 2023,
  arXiv:2305.14314, appendix E); the layout is bitsandbytes'.
- `int4`: the same with 15 values at equal distances.

Doubly quantized, the scales of 4-bit numbers are in 8 bits themselves, 256 of them to a step.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Format = Literal["int8", "int4", "nf4"]
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
INT4 = [n / 7 for n in range(-8, 8)]
BLOCK, SCALES = 64, 256  # numbers to a scale, and scales to a step of theirs


def values(form: Format) -> Tensor:
    """The 16 numbers that 4 bits stand for, in order, float32."""
    return torch.tensor(NF4 if form == "nf4" else INT4)


def encode(weight: Tensor, form: Format, double: bool = False) -> dict[str, Tensor]:
    """What holds `weight` (any shape of at least one row) in `form`.

    Returns:
        int8: `codes` int8 in its shape, `scales` a row. 4 bits: `codes` uint8, two numbers to a byte, the first one high;
        `scales` a block, or doubly quantized `scale_codes` int8, `scale_steps` and `scale_mean`.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if form == "int8":
        scales = weight.abs().amax(1) / 127
        codes = (weight / _divisor(scales)[:, None]).round().clamp(-127, 127)
        return {"codes": codes.to(torch.int8), "scales": scales}
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    known = values(form).to(weight)
    between = (known[1:] + known[:-1]) / 2
    codes = torch.bucketize(blocks / _divisor(scales)[:, None], between).to(torch.uint8).flatten()[: len(flat)]
    codes = F.pad(codes, (0, len(codes) % 2))
    packed = codes[::2] << 4 | codes[1::2]
    if not double:
        return {"codes": packed, "scales": scales}
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
    steps = groups.abs().amax(1) / 127
    scale_codes = (groups / _divisor(steps)[:, None]).round().to(torch.int8).flatten()[: len(scales)]
    return {"codes": packed, "scale_codes": scale_codes, "scale_steps": steps, "scale_mean": mean[None]}


def decode(held: Sequence[Tensor], pairs: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of that shape, from `encode`'s tensors in their order. `pairs` (256, 2) is what a byte of two numbers
    stands for; None for int8."""
    codes, *scaling = held
    if pairs is None:
        return (codes * scaling[0][:, None]).to(dtype)
    scales = scaling[0]
    if len(scaling) > 1:
        scale_codes, steps, mean = scaling
        scales = scale_codes * steps.repeat_interleave(SCALES)[: len(scale_codes)] + mean
    numbers = F.embedding(codes.int(), pairs).flatten()[: shape.numel()]
    whole = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK) * scales[:, None]
    return whole.flatten()[: shape.numel()].view(shape).to(dtype)


class FrozenLinear(nn.Module):
    """`forward(x) -> x Wᵀ + b` with nothing to learn in W and b. `weight` is a parameter where it is not quantized."""

    pairs: Tensor | None

    def __init__(self, linear: nn.Linear, form: Format | None, double: bool = False) -> None:
        super().__init__()
        self.form, self.doubly, self.shape = form, double, linear.weight.shape
        tensors = {"weight": linear.weight.detach()} if form is None else encode(linear.weight, form, double)
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        known = None if form in (None, "int8") else values(form)
        pairs = None if known is None else torch.cartesian_prod(known, known).to(linear.weight.device)
        self.register_buffer("pairs", pairs, persistent=False)

    @property
    def held(self) -> list[Tensor]:
        """The tensors that hold the weight, in order."""
        return [getattr(self, name) for name in self.names]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in)."""
        if self.form is None:
            return self.held[0].to(dtype)
        return decode(self.held, self.pairs, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.form is None:
            return F.linear(x, self.held[0], self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: Tensor = _Product.apply(x.to(dtype), self.pairs, self.shape, *self.held)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, where backward makes W whole again instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, pairs: Tensor | None, shape: torch.Size, *held: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pairs, *held)
        ctx.shape = shape
        return F.linear(x, decode(held, pairs, shape, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        pairs, *held = ctx.saved_tensors
        by_x = upstream @ decode(held, pairs, ctx.shape, upstream.dtype)
        return by_x, None, None, *(None for _ in held)


def quantize(model: nn.Module, form: Format) -> nn.Module:
    """`model`, in place, with the linear layers inside its blocks in `form`: to be used, not to be trained."""
    for parent, name, linear in linears(model.backbone.blocks):  # type: ignore[union-attr, arg-type]  # a ModuleList
        setattr(parent, name, FrozenLinear(linear, form))
    return model


def linears(within: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer, with the module that has it and its name there."""
    for parent in list(within.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield parent, name, child


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1, scales)
