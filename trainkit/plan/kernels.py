"""What a kernel costs and what it takes for itself while it runs: neither is to be seen from the shapes that go in and out.

Workspaces of CPU kernels are what torch 2.13's allocate (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp,
aten/src/ATen/TensorIterator.cpp; oneDNN's scratch measured). Those of CUDA kernels are not yet measured on a GPU:
FlashAttention-2's float32 accumulator of the queries' gradient and its row sums (Dao 2023, arXiv:2307.08691).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from trainkit.plan.world import Line

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mm.out, aten.addmm_.default)
_HALVES = (torch.bfloat16, torch.float16)
# what they look up in a large tensor is little of it
_LOOKUPS = (aten.embedding.default, aten.gather.default, aten.index_select.default, aten.scatter_add_.default)
COLLECTIVE = ("c10d::", "_c10d_functional::")
# a part of an operator's name, what it is called, and how often all bytes but a rank's own go round; 0: from one to another
_COLLECTIVES = (
    ("allreduce", "all-reduce", 2),
    ("all_reduce", "all-reduce", 2),
    ("reduce_scatter", "reduce-scatter", 1),
    ("gather", "all-gather", 1),
    ("broadcast", "broadcast", 0),
    ("send", "send", 0),
)
_REDUCED_BY_ONEDNN = 200 << 10  # scratch a thread of a product in bfloat16, measured for the sizes of gpt2
_TRANSPOSED_BY_ONEDNN = 1_200 << 10  # and where the first matrix is transposed


@dataclass(frozen=True)
class Device:
    """What is planned for. `torch` is the device that its fake tensors say they are on; the allocator gives memory in
    pieces of `unit` bytes; `threads` is of a CPU."""

    torch: torch.device
    cuda: bool = False
    unit: int = 1
    threads: int = 1

    def rounded(self, size: int) -> int:
        """What the allocator takes for so many bytes."""
        return -(-size // self.unit) * self.unit


@dataclass
class Work:
    """What an op costs: operations in `dtype`, bytes read and written, those that the host reads and writes in its own
    memory, bytes that go between host and device (`beside`: which waits for nobody), bytes that this rank sends to the
    others of a `line` by a `collective`, in so many `turns`. It is done `times` over."""

    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    bytes: int = 0
    on_host: int = 0
    moved: int = 0
    sent: int = 0
    beside: bool = False
    collective: str = ""
    line: Line | None = None
    turns: int = 0
    phase: str = ""
    forward: int = 0  # how many forwards the step had begun
    times: int = 1


def where(tensor: Tensor) -> torch.device:
    """The device that it says it is on. To ask a fake tensor in the usual way takes its time."""
    found: torch.device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return found


def workspace(func: Any, args: Any, inputs: Sequence[Tensor], made: Sequence[Tensor], device: Device) -> int:
    """Bytes that the kernel of `func` holds while it runs, beside what goes in and comes out."""
    if func in (_FORWARD, _BACKWARD):
        return _of_attention(func, args, device)
    if device.cuda:
        return 0
    if func.name().startswith(COLLECTIVE):  # gloo gathers into, and scatters from, a copy of the whole
        copied = any(words in func.name() for words in ("gather", "reduce_scatter"))
        return max((t.nbytes for t in [*inputs, *made]), default=0) if copied else 0
    if func in _MATMULS and inputs[-1].dtype == torch.bfloat16:
        transposed = not inputs[-2].is_contiguous() and func is not aten.bmm.default
        return device.threads * (_TRANSPOSED_BY_ONEDNN if transposed else _REDUCED_BY_ONEDNN)
    if torch.Tag.pointwise in func.tags and made:
        return _of_casts(func, inputs, made[0])
    return 0


def work(
    func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], made: Sequence[Tensor], device: Device
) -> Work | None:
    """What the op costs; None where it only looks at memory in another way, or is a collective."""
    name = func.name()
    if name.startswith(COLLECTIVE):
        return None
    if func.is_view or name.startswith(("prim::", "profiler::")) or not (inputs or made):
        return None
    tensors = [*inputs, *made]
    places = {where(t) for t in tensors if t.ndim}
    if len(places) > 1:
        moved = max(t.nbytes for t in tensors if t.ndim)
        beside = bool(kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        return Work(moved=moved, beside=beside)
    if device.torch not in (places or {where(t) for t in tensors}):
        return Work(on_host=sum(t.nbytes for t in tensors))
    if func in _LOOKUPS:
        size = 2 * min(t.nbytes for t in tensors if t.is_floating_point()) if tensors else 0
        return Work(bytes=size)
    dtype = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
    return Work(flops=_flops(func, args, kwargs, made), dtype=dtype, bytes=sum(t.nbytes for t in tensors))


def _flops(func: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> float:
    """Two a multiply-add. Of causal attention only the half that is needed, as the fused kernels do it; of the backward,
    the five products of FlashAttention."""
    if func in (_FORWARD, _BACKWARD):
        query, key = (args[0], args[1]) if func is _FORWARD else (args[1], args[2])
        causal = (args[4] if len(args) > 4 else False) if func is _FORWARD else args[7]
        rows, heads, length, k = query.shape
        whole = (4 if func is _FORWARD else 10) * rows * heads * length * key.shape[2] * k
        return whole / 2 if causal else whole
    packet = func.overloadpacket
    if packet is aten.mm and func is aten.mm.out:
        return 2.0 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    if func is aten.addmm_.default:
        return 2.0 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    if packet in flop_registry and made:
        counted: float = flop_registry[packet](*args, **kwargs, out_val=made[0])
        return counted
    return 0.0


def _of_attention(func: Any, args: Any, device: Device) -> int:
    forward = func is _FORWARD
    query, key = (args[0], args[1]) if forward else (args[1], args[2])
    rows, heads, length, k = query.shape
    if device.cuda:
        if forward:
            return 0
        groups, wide = key.shape[1], rows * heads * -(-length // 128) * 128
        shared = 2 * rows * heads * key.shape[2] * k * query.element_size() if groups != heads else 0
        return wide * k * 4 + wide * 4 + shared
    q = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    s = min(key.shape[2], 512)
    half = query.dtype in _HALVES
    wide = 8 if query.dtype == torch.float64 else 4
    if forward:
        return device.threads * (wide * (q * s + 2 * q + q * k) + 2 * q * s * half)
    buffers = wide * (2 * q * s + q) + half * 4 * q * s
    return device.threads * (buffers + half * (_REDUCED_BY_ONEDNN + wide * q * s // 4))


def _of_casts(func: Any, inputs: Sequence[Tensor], out: Tensor) -> int:
    """A CPU's pointwise kernels first make copies of those inputs that have another dtype than is computed in."""
    if "copy" in func.name():
        return 0
    tensors = [t for t in inputs if t.ndim and not (t.dtype == torch.bool and func is aten.where.self)]
    common = out.dtype
    if out.dtype == torch.bool and tensors:
        common = tensors[0].dtype
        for tensor in tensors[1:]:
            common = torch.promote_types(common, tensor.dtype)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)


def collective(func: Any, line: Line, inputs: Sequence[Tensor], made: Sequence[Tensor]) -> Work | None:
    """What a collective sends from each rank, in a ring (Patarasuk & Yuan 2009); None where it sends nothing."""
    name, size = func.name(), max((t.nbytes for t in [*inputs, *made]), default=0)
    for words, called, rounds in _COLLECTIVES:
        if words in name:
            share = (line.size - 1) / line.size if rounds else 1.0
            turns = max(rounds, 1) * (line.size - 1) if rounds else 1
            return Work(sent=math.ceil(size * max(rounds, 1) * share), collective=called, line=line, turns=turns)
    return None
