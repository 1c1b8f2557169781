"""How long a device stands still until FSDP has put its next parameters together, from the host's memory or from other
ranks' slices."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MOST = 1 << 16  # waits that are remembered until somebody asks for them


class Waits:
    """Times FSDP's own hooks on `modules`, which have to be there already, from a hook in front of them to one behind: on a
    GPU by events of its stream, on a CPU by the clock. With the wait goes the copy from what was received into place, and
    before the first step what FSDP sets up."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._waits: deque[tuple[Any, Any]] = deque(maxlen=MOST)
        for module in modules:
            module.register_forward_pre_hook(self._begin, prepend=True)
            module.register_forward_pre_hook(self._end)
            # a tensor's hooks run in the order in which they are registered, and FSDP's forward hook registers one as well
            module.register_forward_hook(self._before_backward, prepend=True)
            module.register_forward_hook(self._behind_backward)

    def stats(self) -> dict[str, float]:
        """Seconds of forwards and backwards since the last call."""
        waits, self._waits = self._waits, deque(maxlen=MOST)
        if self._device.type != "cuda":
            return {"stream_wait_s": sum(end - begin for begin, end in waits)}
        if waits:
            waits[-1][1].synchronize()
        return {"stream_wait_s": sum(begin.elapsed_time(end) for begin, end in waits) / 1000}

    @torch.compiler.disable
    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    @torch.compiler.disable
    def _end(self, *_: Any) -> None:
        self._waits.append((self._began, self._now()))

    @torch.compiler.disable
    def _before_backward(self, module: nn.Module, arguments: Any, out: Any) -> None:
        for tensor in _learning(out):
            tensor.register_hook(self._begin)

    @torch.compiler.disable
    def _behind_backward(self, module: nn.Module, arguments: Any, out: Any) -> None:
        for tensor in _learning(out):
            tensor.register_hook(self._end)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _learning(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
