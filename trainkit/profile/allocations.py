"""Bytes that torch's allocator really hands out, by what they are for and when: on a CPU and on a GPU.

It counts every allocation of torch's own allocator on one device, what C++ kernels need for a moment included, as
`torch.profiler` reports them. What others allocate is not counted: numpy, files that are mapped, libraries' own
workspaces, and what other Python threads allocate (a loader's workers, a checkpoint's writer). On a GPU sizes are those
of the allocator's blocks, as in `torch.cuda.memory_allocated`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainkit.profile import stream
from trainkit.profile.blocks import (
    CATEGORIES,
    GRADIENTS,
    PARAMETERS,
    STATES,
    TEMPORARY,
    Block,
    Mark,
    Phase,
    Places,
    levels,
    read,
)
from trainkit.profile.phases import parts
from trainkit.profile.stream import Event

__all__ = ["CATEGORIES", "Allocations", "Block", "Phase"]
GRANULE = 512  # bytes; a CUDA block's size is a multiple of it


class Allocations:
    """What `model` and `optimizer` take, and all that is allocated beside them, while this context lasts.

    Categories: *parameters* are parameters and buffers, and what FSDP gathers of them; *gradients* are `.grad`, and what a
    backward leaves behind, such as the buckets that ranks sum; *optimizer* is its state; *activations* are what a
    forward leaves behind for the backward, also one that a backward runs again; *temporary* is the rest.

    Phases are found without changing what runs: `forward`, `backward` and `optimizer`, the latter with clipping and sums
    over ranks. Others are named with `phase(...)`; `step(n)` numbers steps, and what lies between is `outside`.

    The results are there after the context: `peak` is the highest sum of all live allocations, including what lived
    before it (the model's and the optimizer's tensors; on a GPU everything), `at_peak` its categories, `by_phase` the
    same for each phase, `phases` for each phase of each step (`highest`: that of the peak), `blocks` every allocation,
    `line` the bytes of each category after every change.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, device: torch.device | None = None
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = device or next(model.parameters()).device
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._marks: list[Mark] = []
        self.reserved = 0  # on a GPU: the most bytes that the allocator held, what lay idle in it included

    def __enter__(self) -> "Allocations":
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on stderr that it starts and stops
        self._hooks = [register_optimizer_step_pre_hook(self._mark), register_optimizer_step_post_hook(self._mark)]
        self._known = self._places()
        self._first = {s.data_ptr(): StorageWeakRef(s) for _, s in self._storages()}
        self._unknown = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            known = sum(size for _, size in self._known.values())
            self._unknown = max(torch.cuda.memory_allocated(self.device) - known, 0)
        self._profile = profile(use_kineto=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profile.__exit__(*raised)
        for hook in self._hooks:
            hook.remove()
        if raised[0] is None:
            results: Any = self._profile.kineto_results
            self._read(stream.events(results.experimental_event_tree(), self.device))
        del self._profile

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What happens inside is step `number`."""
        with record_function(f"{stream.STEP}{number}"):
            yield
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is the phase `name`, such as `save` or `evaluation`."""
        with record_function(f"{stream.PHASE}{name}"):
            self._mark()
            yield
            self._mark()

    def _storages(self) -> Iterator[tuple[str, torch.UntypedStorage]]:
        """The memory of the model's and the optimizer's tensors with its category."""
        parameters = list(self.model.parameters())
        kinds = {
            STATES: _states(self.optimizer),
            GRADIENTS: [p.grad for p in parameters],
            PARAMETERS: [*parameters, *self.model.buffers()],
        }
        for category, tensors in kinds.items():
            for tensor in _plain(tensors):
                if tensor.device == self.device and (storage := tensor.untyped_storage()).data_ptr():
                    yield category, storage

    def _places(self) -> Places:
        granule = GRANULE if self.device.type == "cuda" else 1
        return {s.data_ptr(): (category, -(-s.nbytes() // granule) * granule) for category, s in self._storages()}

    def _mark(self, *_: Any) -> None:
        """Remember where the known tensors lie at this place of the stream. An optimizer calls it as its hook."""
        with record_function(f"{stream.MARK}{len(self._marks)}"):
            ended = {pointer for pointer, storage in self._first.items() if storage.expired()}
            self._marks.append(Mark(self._places(), ended))

    def _read(self, events: list[Event]) -> None:
        divided = parts(events)
        self.blocks = read(events, divided, self._known, self._marks)
        if self._unknown:
            self.blocks.append(Block(self._unknown, -1, category=TEMPORARY))
        self.phases, self.line = levels(events, divided, self.blocks)
        self.by_phase: dict[str, Phase] = {}
        for it in self.phases:
            if it.phase not in self.by_phase or it.peak > self.by_phase[it.phase].peak:
                self.by_phase[it.phase] = it
        self.highest = max(self.phases, key=lambda it: it.peak)
        self.peak, self.at_peak = self.highest.peak, dict(self.highest.at_peak)
        if self.device.type == "cuda":
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            unseen = max(torch.cuda.max_memory_allocated(self.device) - self.peak, 0)
            self.peak += unseen
            self.at_peak[TEMPORARY] += unseen


def _states(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p] for p in parameters if p in optimizer.state]


def _plain(values: Any) -> Iterator[Tensor]:
    """The tensors that have memory of their own in a tree of values: of a DTensor this rank's part, of a quantized tensor
    its numbers and scales."""
    if isinstance(values, dict):
        yield from _plain(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _plain(value)
    elif isinstance(values, Tensor) and is_traceable_wrapper_subclass(values):
        names, _ = values.__tensor_flatten__()
        yield from _plain([getattr(values, name) for name in names])
    elif isinstance(values, Tensor):
        yield values
