"""One number of many, by which two computations of the same tensors are compared."""

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_LOW = (1 << 52) - 1  # what a float64 holds of an integer for sure


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """A float64 scalar of all the numbers (this rank's slices of them). On a CPU, where arithmetic is the same each time, it
    is a sum over their bits, which any flipped one changes; elsewhere it is their norm."""
    local = [(t.to_local() if hasattr(t, "to_local") else t).detach() for t in tensors]  # of DTensors
    if local[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm([t if t.is_floating_point() else t.double() for t in local]).double()
    total = torch.stack([_bits(t) for t in local]).sum()
    return ((total & _LOW) ^ ((total >> 52) & 0xFFF)).double()


def _bits(tensor: Tensor) -> Tensor:
    """The sum, modulo 2**64, of a tensor's bytes taken eight at a time."""
    flat, each = tensor.reshape(-1), 8 // tensor.itemsize
    if flat.storage_offset() % each:
        flat = flat.clone()
    whole = len(flat) // each * each
    rest = flat[whole:].view(_INTEGERS[tensor.itemsize])
    return flat[:whole].view(torch.int64).sum() + rest.sum(dtype=torch.int64)
