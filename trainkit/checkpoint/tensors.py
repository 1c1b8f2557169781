"""Tensors as safetensors files (https://github.com/huggingface/safetensors), written and read one tensor at a time.

A header of 8 bytes for its length and JSON for the names, dtypes, shapes and places, then raw little-endian numbers. The
library's own reader and writer would hold a second copy of everything.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit import strict

MAX_HEADER = 32 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SCRATCH = 8 << 20


class Source(Protocol):
    """Bytes in order."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view`; ValueError where the bytes end before it does."""


def dtype_name(dtype: torch.dtype) -> str:
    """What a file calls it."""
    return _NAMES[dtype]


def parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors, in pieces."""
    # the widest types first, so that every tensor is aligned to its own width
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, place = {}, 0
    for name, tensor in ordered:
        end = place + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield raw(tensor.detach().cpu().contiguous())


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read or to write."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def stream(source: Source) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Callable[[Tensor], None]]]:
    """The tensors of a safetensors file in the order of its bytes: name, dtype, shape, and a function that reads it into
    a contiguous tensor on the CPU. One that is not read is passed over.

    Raises:
        ValueError: the header is none, or a tensor is not where it says.
    """
    length = int.from_bytes(_taken(source, 8), "little")
    if length > MAX_HEADER:
        raise ValueError("its header is longer than any")
    header = strict.parse_json(bytes(_taken(source, length)), max_bytes=MAX_HEADER, max_depth=8)
    if not isinstance(header, dict):
        raise ValueError("its header is none")
    place = 0
    for name, dtype, shape, begin, end in sorted((_facts(n, f) for n, f in header.items()), key=lambda f: f[3:]):
        if begin != place or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"the tensor {name} is not where the header says")
        place, done = end, False

        def fill(tensor: Tensor, name: str = name, dtype: torch.dtype = dtype, size: int = end - begin) -> None:
            nonlocal done
            assert (tensor.dtype, tensor.nbytes, tensor.is_contiguous()) == (dtype, size, True), name
            if size:
                source.read_into(raw(tensor))
            done = True

        yield name, dtype, shape, fill
        if not done:
            _pass_over(source, end - begin)


def _facts(name: str, facts: Any) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    begin, end = facts["data_offsets"]
    shape = tuple(facts["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"the tensor {name} is not where the header says")
    return name, DTYPES[facts["dtype"]], shape, begin, end


def _taken(source: Source, size: int) -> bytearray:
    content = bytearray(size)
    if size:
        source.read_into(memoryview(content))
    return content


def _pass_over(source: Source, size: int) -> None:
    scratch = memoryview(bytearray(min(size, _SCRATCH)))
    while size:
        source.read_into(scratch[: min(size, len(scratch))])
        size -= min(size, len(scratch))
