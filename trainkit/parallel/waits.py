"""How long a device stands still until FSDP has put its next parameters together, from the host's memory or from other
ranks' slices."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainkit.stalls import Stalls


class Waits:
    """Times FSDP's own hooks on `modules`, which have to be there already, from a hook in front of them to one behind: on a
    GPU by events of its stream, on a CPU by the clock. With the wait goes the copy from what was received into place, and
    before the first step what FSDP sets up."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._stalls = Stalls(device)
        self._began: Any = None
        for module in modules:
            module.register_forward_pre_hook(self._begin, prepend=True)
            module.register_forward_pre_hook(self._end)
            # a tensor's hooks run in the order in which they are registered, and FSDP's forward hook registers one as well
            module.register_forward_hook(self._before_backward, prepend=True)
            module.register_forward_hook(self._behind_backward)

    def stats(self) -> dict[str, float]:
        """Seconds of forwards and backwards since the last call."""
        return {"stream_wait_s": self._stalls.seconds()}

    @torch.compiler.disable
    def _begin(self, *_: Any) -> None:
        self._began = self._stalls.now()

    @torch.compiler.disable
    def _end(self, *_: Any) -> None:
        self._stalls.add(self._began)

    @torch.compiler.disable
    def _before_backward(self, module: nn.Module, arguments: Any, out: Any) -> None:
        for tensor in _learning(out):
            tensor.register_hook(self._begin)

    @torch.compiler.disable
    def _behind_backward(self, module: nn.Module, arguments: Any, out: Any) -> None:
        for tensor in _learning(out):
            tensor.register_hook(self._end)


def _learning(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
