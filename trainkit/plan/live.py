"""What is held in memory while a step runs, op by op, and what each op costs. On fake tensors, which have shapes and no
numbers, or on real ones.

A storage lives from the op that makes it until Python and autograd let go of it, as with the real allocator; what a kernel
takes for itself while it runs is `kernels.workspace`'s word.
"""

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from trainkit.parallel import Sizes
from trainkit.plan.engine import alone, called_by_the_engine, references
from trainkit.plan.kernels import COLLECTIVE, Device, Work, collective, where, work, workspace
from trainkit.plan.world import Line, group_of, of_ranks

aten = torch.ops.aten
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary")
STEP = ("forward", "backward", "update")
Place = tuple[str, str]  # a phase, and where in the model


@dataclass
class Peak:
    """The most that was held at once, in bytes, and of what."""

    bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    size: int
    category: str
    here: bool


class OutOfTimeError(RuntimeError):
    """It is later than a trace may take."""


class Live(TorchDispatchMode):
    """Follows what `device` holds; all else is host memory. `peaks` and `host_peaks` are by place, `done` is the work. It
    raises OutOfTimeError soon after `time.monotonic()` is at `until`. `sizes` are those of the mesh whose ranks talk."""

    def __init__(self, device: Device, until: float | None = None, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.until = until
        self.sizes = sizes
        self._lines: dict[str, Line] = {}
        self.device = device
        self.held: Counter[str] = Counter()
        self.host = 0
        self.peaks: dict[Place, Peak] = {}
        self.host_peaks: dict[Place, int] = {}
        self.done: list[Work] = []
        self.phase: str | None = None  # None: forward, backward or update, by what autograd does
        self.part = "before"
        self.forwards = 0  # that a step has made so far
        self._blocks: dict[int, _Block] = {}
        self._after_backward = False
        self._unseen = False
        self._alone = alone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # it is made of plain tensors, whose ops come here in turn
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # what the host asks for has no number: it hears of nothing out of the ordinary
        if func is aten.add.Tensor and (mine := self._summed_in_place(args)) is not None:
            func, args = aten.add_.Tensor, mine
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._enter(tensor)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._unseen:
            return out
        self._look(workspace(func, args, inputs, made, self.device))
        if func.name().startswith(COLLECTIVE):
            cost = self._talk(func, args, inputs, made)
        else:
            cost = work(func, args, kwargs, inputs, made, self.device)
        if cost is not None:
            self.count(cost)
        return out

    def _talk(self, func: Any, args: Any, inputs: list[Tensor], made: list[Tensor]) -> Work | None:
        """What a collective costs among the ranks of its group."""
        if self.sizes is None or (group := group_of(args)) is None:
            return None
        if group.group_name not in self._lines:
            self._lines[group.group_name] = of_ranks(torch.distributed.get_process_group_ranks(group), self.sizes)
        return collective(func, self._lines[group.group_name], inputs, made)

    def count(self, cost: Work) -> None:
        """Something was done that takes time."""
        if self._unseen:
            return
        cost.phase, cost.forward = self.now(), self.forwards
        self.done.append(cost)

    def now(self) -> str:
        """The phase that this is."""
        if self.phase is not None:
            return self.phase
        if torch._C._current_graph_task_id() != -1:
            self._after_backward = True
            return "backward"
        return "update" if self._after_backward else "forward"

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what these tensors are."""
        for tensor in (part for whole in tensors for part in plain(whole)):
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None and block.category != category:
                if block.here:
                    self.held[block.category] -= block.size
                    self.held[category] += block.size
                block.category = category

    def forget(self) -> None:
        """Begin to count work anew."""
        self.in_time()
        self.done, self.forwards = [], 0

    def in_time(self) -> None:
        """Raise OutOfTimeError when it is too late. Not in a backward: C++ that may not throw would end the process."""
        if self.until is not None and time.monotonic() > self.until and torch._C._current_graph_task_id() == -1:
            raise OutOfTimeError

    def __enter__(self) -> "Live":
        """Storages that are resized (FSDP does) change what is held, too."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if (block := self._blocks.get(storage._cdata)) is not None and not self._unseen:
                self._grow(block, self.device.rounded(size) - block.size)
                block.size = self.device.rounded(size)
                self._look(0)
            return out

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside is that phase."""
        self.in_time()
        self.phase = phase
        self._look(0)
        yield
        self._look(0)
        self.phase = None

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made inside takes nothing."""
        before, self._unseen = self._unseen, True
        yield
        self._unseen = before

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Know parameters, gradients and state, and at which block a step is: the first, an inner one, the last, or before
        or after them."""
        parameters = [p for p in model.parameters() if p.requires_grad]

        def name_gradients(*_: Any) -> None:
            self.in_time()
            self.label([p.grad for p in parameters if p.grad is not None], "gradients")

        def name_state(*_: Any) -> None:
            states = [optimizer.state[p] for p in parameters if p in optimizer.state]
            self.label([t for t in tree_leaves(states) if isinstance(t, Tensor)], "optimizer")

        def name_gradient(parameter: Tensor) -> None:
            self.label([parameter.grad] if parameter.grad is not None else [], "gradients")

        def count(*_: Any) -> None:
            self.forwards += 1
            self._after_backward = False

        self.label([*model.parameters(), *model.buffers()], "parameters")
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(name_gradient)
        optimizer.register_step_pre_hook(name_gradients)
        optimizer.register_step_post_hook(name_state)
        pipeline = getattr(model, "pipeline", None)
        for stage in pipeline.stages.values() if pipeline is not None else (model,):
            stage.register_forward_pre_hook(count)
        blocks: Any = model.backbone.blocks  # type: ignore[union-attr]  # a task's model has them
        for number, block in enumerate(blocks):
            part = "first" if number == 0 else "last" if number == len(blocks) - 1 else "inner"
            block.register_forward_pre_hook(self._entering(part, number))
            block.register_forward_hook(self._leaving(part, number == len(blocks) - 1))

    def _entering(self, part: str, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.in_time()
            self.part = part
            if number == 0 and isinstance(args[0], Tensor) and args[0].requires_grad:
                args[0].register_hook(lambda grad: self._at("before"))

        return hook

    def _leaving(self, part: str, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda grad: self._at(part))
            if last:
                self.part = "after"

        return hook

    def _at(self, part: str) -> None:
        self.part = part

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self.device.rounded(storage.nbytes())
        if key in self._blocks:
            return
        size = 0 if self._unseen or where(tensor).type == "meta" else size
        here = where(tensor) == self.device.torch
        category = "activations" if torch.is_grad_enabled() and self.phase is None else "temporary"
        block = _Block(size, category, here)
        self._blocks[key] = block
        self._grow(block, size)
        weakref.finalize(storage, self._leave, key, block).atexit = False

    def _leave(self, key: int, block: _Block) -> None:
        del self._blocks[key]
        self._grow(block, -block.size)

    def _grow(self, block: _Block, size: int) -> None:
        if block.here:
            self.held[block.category] += size
        else:
            self.host += size

    def _look(self, extra: int) -> None:
        place = (self.now(), self.part)
        total = sum(self.held.values()) + extra
        peak = self.peaks.setdefault(place, Peak())
        if total > peak.bytes:
            self.peaks[place] = Peak(total, {**self.held, "temporary": self.held["temporary"] + extra})
        self.host_peaks[place] = max(self.host_peaks.get(place, 0), self.host)

    def _summed_in_place(self, args: Any) -> Any:
        """The gradients that autograd sums into the buffer of one, which it does not do with fake tensors.

        torch/csrc/autograd/input_buffer.cpp: where nobody else holds the first one, nothing new is made.
        """
        if len(args) < 2 or not isinstance(args[1], Tensor) or torch._C._current_graph_task_id() == -1:
            return None
        if torch.is_grad_enabled() or args[0].shape != args[1].shape or args[0].dtype != args[1].dtype:
            return None
        if not called_by_the_engine():
            return None
        held = args[0]
        free = references(held) <= self._alone and held.untyped_storage().nbytes() == held.nbytes
        return (held, args[1]) if free else None


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from plain(part)
