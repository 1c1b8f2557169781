"""Tensors as safetensors files (https://github.com/huggingface/safetensors), written one tensor at a time.

A header of 8 bytes for its length and JSON for the names, dtypes, shapes and places, then raw little-endian numbers. The
library's own reader and writer would hold a second copy of everything.
"""

import json
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

SHARD_BYTES = 4 << 30
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
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def shards(tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Which tensors go into which file: `shard-00000-of-00002.safetensors` and so on, each of at most `limit` bytes
    unless one tensor is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return {f"shard-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


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
            flat = tensor.detach().cpu().contiguous().flatten()
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """What a manifest says of each tensor."""
    return {name: {"dtype": _NAMES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()}


def read(content: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file's content, on the CPU. They are views of `content`: nothing is copied.

    Raises:
        ValueError: the header is none, or a tensor is not where it says.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("its header is longer than the file")
    header = json.loads(content[8 : 8 + length])
    base = 8 + length
    tensors = {}
    for name, facts in header.items():
        dtype, shape, (begin, end) = _DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"]
        count = math.prod(shape)
        if not 0 <= begin <= end <= len(content) - base or count * dtype.itemsize != end - begin:
            raise ValueError(f"the tensor {name} is not where the header says")
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=base + begin) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).reshape(shape)
    return tensors
