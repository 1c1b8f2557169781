"""What stands in for parts of a run while it is traced: for loops that do the same many times over, and for what a GPU does
otherwise than the CPU whose kernels are traced.

Not yet measured on a GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from trainkit.memory import offload_activations
from trainkit.memory.lanes import HostLanes
from trainkit.memory.offload_activations import Saved
from trainkit.optimizers import formats, low_bit, rounding
from trainkit.plan.kernels import Work, where
from trainkit.plan.live import Live
from trainkit.tasks import loss

T = TypeVar("T")


@contextmanager
def standing_in(live: Live) -> Iterator[None]:
    """Inside, whatever `live` follows is done as its device does it, and loops over equal pieces only at their ends."""
    with ExitStack() as stack:

        def put(room: Any, **others: Any) -> None:
            stack.enter_context(mock.patch.multiple(room, **others))

        put(low_bit, _chunks=lambda tensors, size: _pieces(live, tensors, size))
        put(
            formats,
            _row_chunks=lambda *tensors: _pieces(live, tensors, max(1, (1 << 20) // max(1, tensors[0].shape[1]))),
        )
        put(rounding, _begins=lambda count, size: first_and_last(live, range(0, count, size)))
        put(loss, _begins=lambda count, size: first_and_last(live, range(0, count, size)))
        if torch.distributed.is_initialized():
            from torch.distributed.tensor._sharding_prop import ShardingPropagator

            put(ShardingPropagator, _propagate_tensor_meta_non_cached=_of_shapes_alone(live, ShardingPropagator))
        if live.device.cuda:
            put(HostLanes, serve=lambda self, device: isinstance(self, _Lanes))
            put(offload_activations, lanes=lambda device: _Lanes(live), _plain=_fake, _looked_at=_of_bytes)
            put(F, scaled_dot_product_attention=_attention, rms_norm=_norm)
            put(rounding, CHUNK=rounding.BUCKET)
            put(loss, BLOCK=None)
            put(low_bit, CPU_CHUNK=low_bit.GPU_CHUNK, _kernel=_of_one_kernel(live))
        yield


def first_and_last(live: Live, pieces: Iterable[T]) -> Iterator[T]:
    """Of many equal pieces the first one, whose work counts for all but the last, and the last one."""
    known = list(pieces)
    if len(known) < 3:
        yield from known
        return
    begin = len(live.done)
    yield known[0]
    for work in live.done[begin:]:
        work.times *= len(known) - 1
    yield known[-1]


def _pieces(live: Live, tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    tensors = list(tensors)
    for begin in first_and_last(live, range(0, len(tensors[0]), size)):
        yield [t[begin : begin + size] for t in tensors]


def _of_shapes_alone(live: Live, propagator: Any) -> Callable[..., Any]:
    """To learn a result's shape DTensor runs an operator on fakes of whole tensors, which nobody holds memory for."""
    real = propagator._propagate_tensor_meta_non_cached

    def propagate(*args: Any) -> Any:
        with live.unseen():
            return real(*args)

    return propagate


def _attention(*args: Any, real: Any = F.scaled_dot_product_attention, **kwargs: Any) -> Tensor:
    """CUDA's kernels make dropout themselves, where the CPU's would keep every score."""
    out: Tensor = real(*args, **{**kwargs, "dropout_p": 0.0})
    return out


def _norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None, real: Any = F.rms_norm
) -> Tensor:
    """RMSNorm is one kernel on CUDA, where the CPU's is several that keep what is between them."""
    out: Tensor = real(x, shape, weight, eps) if weight is None else _FusedNorm.apply(x, weight)
    return out


class _FusedNorm(torch.autograd.Function):
    """RMSNorm in one kernel: it keeps its input and one number a row (aten::_fused_rms_norm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty_like(x[..., :1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Lanes(HostLanes):
    """As `CudaLanes` does it: what leaves a block is held until the next one is done, and what comes back has new memory."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._leaving: list[list[UntypedStorage]] = []
        self._block: list[UntypedStorage] = []

    def send(self, storage: UntypedStorage) -> Tensor:
        self._block.append(storage)
        self._live.count(Work(moved=storage.nbytes(), beside=True))
        return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")

    def settle(self, keep: int) -> None:
        if self._block:
            self._leaving.append(self._block)
            self._block = []
        del self._leaving[: max(0, len(self._leaving) - keep)]

    def fetch(self, sent: Tensor) -> Tensor:
        self._live.count(Work(moved=sent.nbytes, beside=True))
        return torch.empty(sent.nbytes, dtype=torch.uint8, device=self._live.device.torch)


def _fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.layout == torch.strided


def _of_bytes(storage: Any, saved: Saved) -> Tensor:
    """How a saved tensor looks at bytes that came back, which `_Lanes` has as a tensor."""
    whole: Tensor = storage
    return whole.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


def _of_one_kernel(live: Live, real: Any = low_bit._kernel) -> Callable[..., Callable[..., None]]:
    """A GPU's step of low-bit states is always compiled, to one kernel that makes nothing in between. On the host it is
    what it is."""

    def kernel(rule: Any, format_: str | None, compiled: bool) -> Callable[..., None]:
        def step(p: Tensor, g: Tensor, states: list[list[Tensor]], by: Tensor, skip: Tensor | None) -> None:
            if where(p) != live.device.torch:
                real(rule, format_, False)(p, g, states, by, skip)
                return
            written = [p, *(t for both in states for t in both)]
            live.count(Work(bytes=g.nbytes + 2 * sum(t.nbytes for t in written)))

        return step

    return kernel
