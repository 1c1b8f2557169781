"""Optimizer states of few bits: a code for every number, and a scale for every block of 128 along a row.

A block never crosses a row, so that a slice of rows, or of whole blocks of columns, is the same slice of codes and scales
wherever the parameter lies: states move between layouts bit by bit. (Block-wise states: Dettmers et al. 2022,
arXiv:2110.02861; a second moment without zero, in 4 bits: Li et al. 2023, arXiv:2309.01507.)

A number is divided by the largest of its block, and a root of the quotient is rounded: that spends the codes on small
numbers, as Dettmers' dynamic tree does, with a smaller error (docs/benchmarks/memory.md), and needs no table. The second
moment is never rounded to zero, because it divides.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
LEAST = 4096  # numbers below which a tensor is not worth it
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}  # the states that can be of few bits
_TINY = torch.finfo(torch.float32).tiny
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Code:
    """`levels` steps from 0 to the block's largest, in the `roots`-fold square root. `bits` 8 or 4; `floating` for e4m3."""

    bits: int
    levels: float
    roots: int
    signed: bool
    floating: bool = False

    def encode(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., width) uint8, two a byte in 4 bits, and scales (...) float32 of blocks (..., width)."""
        scale = numbers.abs().amax(-1)
        part = numbers / scale.clamp(min=_TINY).unsqueeze(-1)
        size = part.abs() if self.signed else part
        for _ in range(self.roots):
            size = size.sqrt()
        size = size * self.levels
        if self.floating:
            size = torch.copysign(size, part) if self.signed else size.clamp(min=2.0**-9)
            return size.to(_E4M3).view(torch.uint8), scale.float()
        size = size.round()
        if self.signed:
            codes = (torch.copysign(size, part) + 2.0 ** (self.bits - 1)).to(torch.uint8)
        else:
            codes = (size.clamp(min=1) - int(self.bits == 4)).to(torch.uint8)
        return (_two_a_byte(codes) if self.bits == 4 else codes), scale.float()

    def decode(self, codes: Tensor, scale: Tensor, width: int) -> Tensor:
        """The float32 numbers (..., width) of what `encode` gave."""
        if self.floating:
            size = codes.view(_E4M3).float()
        else:
            size = (_one_a_byte(codes, width) if self.bits == 4 else codes).float()
            size = size - 2.0 ** (self.bits - 1) if self.signed else size + int(self.bits == 4)
        size = size / self.levels
        power = size
        for _ in range(self.roots):
            power = power * power
        return (torch.copysign(power, size) if self.signed else power) * scale.unsqueeze(-1)


CODES = {
    "int8": {True: Code(8, 127, 1, True), False: Code(8, 255, 2, False)},
    "int4": {True: Code(4, 7, 1, True), False: Code(4, 16, 2, False)},
    "fp8": {True: Code(8, 448, 0, True, floating=True), False: Code(8, 448, 1, False, floating=True)},
}


def code_of(key: str) -> tuple[str, str, Code] | None:
    """The moment, format and code that a state's key names (`exp_avg_int8`, or `exp_avg_int8_scale`), if it does."""
    moment, _, format_ = key.removesuffix("_scale").rpartition("_")
    return (moment, format_, CODES[format_][SIGNED[moment]]) if moment in SIGNED and format_ in CODES else None


def fits(parameter: Tensor) -> bool:
    """Whether its states are kept in few bits: a matrix, of some size. It does not depend on the layout."""
    return parameter.ndim >= 2 and parameter.numel() >= LEAST


def columns(code: Code, width: int) -> tuple[int, int]:
    """How many columns of codes and of scales a row of `width` numbers has."""
    return -(-width // 2) if code.bits == 4 else width, -(-width // BLOCK)


def pieces(code: Code | None, width: int) -> list[tuple[slice, slice, slice, int]]:
    """The columns of a row's whole blocks and of what is left over: in numbers, in codes, in scales, and a block's width."""
    whole = width // BLOCK * BLOCK
    found = []
    for begin, end, block in ((0, whole, BLOCK), (whole, width, width - whole)):
        if end > begin:
            of_codes = slice(begin, end) if code is None or code.bits == 8 else slice(begin // 2, -(-end // 2))
            found.append((slice(begin, end), of_codes, slice(begin // BLOCK, -(-end // BLOCK)), block))
    return found


def empty(code: Code, like: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of zeros, for a tensor (..., width)."""
    device = device or like.device
    of_codes, of_scales = columns(code, like.shape[-1])
    rows = like.shape[:-1]
    return (
        torch.zeros(*rows, of_codes, dtype=torch.uint8, device=device),
        torch.zeros(*rows, of_scales, dtype=torch.float32, device=device),
    )


def quantize(numbers: Tensor, code: Code, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The codes and scales of a tensor (..., width) that lies here whole, or rows of it; a few rows at a time."""
    into = into or empty(code, numbers)
    rows = [t.flatten(0, -2) for t in (numbers, *into)]
    for some in _row_chunks(*rows):
        for of_numbers, of_codes, of_scales, width in pieces(code, numbers.shape[-1]):
            codes, scale = code.encode(some[0][:, of_numbers].unflatten(-1, (-1, width)))
            some[1][:, of_codes] = codes.flatten(-2)
            some[2][:, of_scales] = scale
    return into


def dequantize(codes: Tensor, scales: Tensor, code: Code, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers (..., width) of what `quantize` gave."""
    numbers = torch.empty(*codes.shape[:-1], width, dtype=dtype, device=codes.device)
    rows = [t.flatten(0, -2) for t in (numbers, codes, scales)]
    for some in _row_chunks(*rows):
        for of_numbers, of_codes, of_scales, block in pieces(code, width):
            packed = some[1][:, of_codes].unflatten(-1, (some[2][:, of_scales].shape[1], -1))
            some[0][:, of_numbers] = code.decode(packed, some[2][:, of_scales], block).flatten(-2).to(dtype)
    return numbers


def converted(local: Mapping[str, Tensor], to: str | None, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One parameter's state, of local tensors, in the format `to` (None: numbers of `dtype`), whatever it is in."""
    made: dict[str, Tensor] = {}
    for key, value in local.items():
        found = code_of(key)
        if found is not None and found[1] != to:
            if key.endswith("_scale"):
                continue
            moment, _, code = found
            key, value = moment, dequantize(value, local[f"{key}_scale"], code, width, dtype)
        if to is not None and key in SIGNED and value.ndim:
            codes, scales = quantize(value, CODES[to][SIGNED[key]])
            made |= {f"{key}_{to}": codes, f"{key}_{to}_scale": scales}
        else:
            made[key] = value
    return made


def _row_chunks(*tensors: Tensor) -> list[list[Tensor]]:
    """The same rows of all, some at a time, so that what is in between stays small."""
    step = max(1, (1 << 20) // max(1, tensors[0].shape[1]))
    return [[t[i : i + step] for t in tensors] for i in range(0, len(tensors[0]), step)]


def _two_a_byte(codes: Tensor) -> Tensor:
    """Numbers of 4 bits: a block's first half in the low ones, its second half in the high ones."""
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    if codes.shape[-1] % 2:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | (high << 4)


def _one_a_byte(codes: Tensor, width: int) -> Tensor:
    return torch.cat([codes & 15, codes >> 4], -1)[..., :width]
