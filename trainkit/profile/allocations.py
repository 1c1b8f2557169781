"""Bytes that torch's allocator really hands out, by what they are for and when: on a CPU and on a GPU.

It counts every allocation of torch's own allocator on one device, what C++ kernels need for a moment included, as
`torch.profiler` reports them. What others allocate is not counted: numpy, files that are mapped, libraries' own
workspaces, and what other Python threads allocate (a loader's workers, a checkpoint's writer). On a GPU sizes are those
of the allocator's blocks, as in `torch.cuda.memory_allocated`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainkit.profile import stream
from trainkit.profile.phases import BACKWARD, FORWARD, Part, parts
from trainkit.profile.stream import Event, Kind

PARAMETERS, GRADIENTS, STATES, ACTIVATIONS, TEMPORARY = CATEGORIES = (
    *("parameters", "gradients", "optimizer", "activations", "temporary"),
)
GRANULE = 512  # a CUDA block's size is a multiple of it
_GATHERED = ("FSDP::all_gather", "FSDP::pre_forward", "FSDP::pre_backward")
_REDUCED = ("FSDP::post_backward",)


@dataclass(slots=True)
class Block:
    """One allocation: its size in bytes, when it lived (in events; `end` None: it still does), and what made it."""

    bytes: int
    begin: int
    made_by: tuple[str, ...] = ()
    end: int | None = None
    category: str = ""
    step: int = -1
    phase: str = ""


@dataclass
class Phase:
    """A phase of a step: the most bytes that were allocated at once in it, and their categories, which add up to it."""

    step: int
    phase: str
    peak: int = -1
    at_peak: dict[str, int] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (begin, end) of the clock, ns


class Allocations:
    """What `model` and `optimizer` take, and all that is allocated beside them, while this context lasts.

    Categories: *parameters* are parameters and buffers, and what FSDP gathers of them; *gradients* are `.grad`, and what a
    backward leaves behind, such as the buckets that ranks sum; *optimizer* is its state; *activations* are what a
    forward leaves behind for the backward, also one that a backward runs again; *temporary* is the rest.

    Phases are found without changing what runs: `forward`, `backward` and `optimizer`, the latter with clipping and sums
    over ranks. Others are named with `phase(...)`; `step(n)` numbers steps, and what lies between is `outside`.

    The results are there after the context: `peak` is the highest sum of all live allocations, including what lived
    before it (the model's and the optimizer's tensors; on a GPU everything), `at_peak` its categories, `by_phase` the
    same for each phase, `phases` for each phase of each step, `blocks` every allocation, `line` every change.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, device: torch.device | None = None
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = device or next(model.parameters()).device
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._marks: list[dict[int, tuple[str, int]]] = []
        self.reserved = 0  # on a GPU: the most bytes that the allocator held, what lay idle in it included

    def __enter__(self) -> "Allocations":
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on stderr that it starts and stops
        self._hooks = [register_optimizer_step_pre_hook(self._mark), register_optimizer_step_post_hook(self._mark)]
        self._known = self._tensors()
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

    def _tensors(self) -> dict[int, tuple[str, int]]:
        """Where the model's and the optimizer's tensors lie now: address -> (category, bytes)."""
        found: dict[int, tuple[str, int]] = {}
        parameters = list(self.model.parameters())
        kinds: list[tuple[str, Iterable[Any]]] = [
            (STATES, _states(self.optimizer)),
            (GRADIENTS, [p.grad for p in parameters]),
            (PARAMETERS, [*parameters, *self.model.buffers()]),
        ]
        for category, tensors in kinds:
            for tensor in _plain(tensors):
                if tensor.device == self.device and (storage := tensor.untyped_storage()).data_ptr():
                    size = storage.nbytes()
                    if self.device.type == "cuda":
                        size = -(-size // GRANULE) * GRANULE
                    found[storage.data_ptr()] = category, size
        return found

    def _mark(self, *_: Any) -> None:
        """Remember where the known tensors lie at this place of the stream. An optimizer calls it as its hook."""
        with record_function(f"{stream.MARK}{len(self._marks)}"):
            self._marks.append(self._tensors())

    def _read(self, events: list[Event]) -> None:
        self.blocks = _Reader(events, self._known, self._marks).blocks()
        if self._unknown:
            self.blocks.append(Block(self._unknown, -1, category=TEMPORARY))
        self.phases, self.line = _levels(events, parts(events), self.blocks)
        self.by_phase: dict[str, Phase] = {}
        for it in self.phases:
            if it.phase not in self.by_phase or it.peak > self.by_phase[it.phase].peak:
                self.by_phase[it.phase] = it
        highest = max(self.phases, key=lambda it: it.peak)
        self.peak, self.at_peak = highest.peak, dict(highest.at_peak)
        if self.device.type == "cuda":
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            unseen = max(torch.cuda.max_memory_allocated(self.device) - self.peak, 0)
            self.peak += unseen
            self.at_peak[TEMPORARY] += unseen


class _Reader:
    """From events to blocks with their categories."""

    def __init__(
        self, events: list[Event], known: dict[int, tuple[str, int]], marks: list[dict[int, tuple[str, int]]]
    ) -> None:
        self._events, self._marks = events, marks
        self._before = {pointer: Block(size, -1, category=category) for pointer, (category, size) in known.items()}
        self._live = dict(self._before)  # by address, the oldest first
        self._blocks = list(self._before.values())

    def blocks(self) -> list[Block]:
        begun: list[int] = []
        for part in parts(self._events):
            if part.phase == BACKWARD:
                self._is(ACTIVATIONS, lambda block: block.phase == FORWARD)
            for i in range(part.begin, part.end):
                event = self._events[i]
                match event.kind:
                    case Kind.MEMORY:
                        self._memory(i, event, part)
                    case Kind.MARK:
                        self._marked(i, self._marks[int(event.text)])
                    case Kind.AGAIN | Kind.UPDATE:
                        begun.append(i)
                    case Kind.AGAIN_END | Kind.UPDATE_END:
                        since = begun.pop()
                        category = STATES if event.kind is Kind.UPDATE_END else ACTIVATIONS
                        self._is(category, lambda block, since=since: block.begin > since)
            if part.phase == BACKWARD:
                self._is(GRADIENTS, lambda block, part=part: block.begin >= part.begin)
        for block in self._blocks:
            block.category = block.category or TEMPORARY
        return self._blocks

    def _memory(self, i: int, event: Event, part: Part) -> None:
        gone = self._live.pop(event.pointer, None)
        if gone is not None:
            gone.end = i
        if event.bytes > 0:
            block = Block(event.bytes, i, event.within, category=_fsdp(event.within), step=part.step, phase=part.phase)
            self._live[event.pointer] = block
            self._blocks.append(block)

    def _marked(self, i: int, known: dict[int, tuple[str, int]]) -> None:
        """Known tensors lie here now. One that was there before, whose end nobody has seen, has ended."""
        for pointer, (category, _) in known.items():
            if pointer in self._live:
                self._live[pointer].category = category
        for pointer in [p for p in self._before if p not in known]:
            block = self._before.pop(pointer)
            if self._live.get(pointer) is block:
                block.end = i
                del self._live[pointer]

    def _is(self, category: str, which: Any) -> None:
        for block in self._live.values():
            if not block.category and which(block):
                block.category = category


def _fsdp(within: tuple[str, ...]) -> str:
    if any(name.startswith(_GATHERED) for name in within):
        return PARAMETERS
    return GRADIENTS if any(name.startswith(_REDUCED) for name in within) else ""


def _levels(
    events: list[Event], parts_: list[Part], blocks: list[Block]
) -> tuple[list[Phase], list[tuple[int, tuple[int, ...]]]]:
    """The phases with their peaks, and the bytes of each category from each change on: (ns, bytes by category)."""
    level = dict.fromkeys(CATEGORIES, 0)
    changes: dict[int, list[tuple[str, int]]] = {}
    for block in blocks:
        changes.setdefault(block.begin, []).append((block.category, block.bytes))
        if block.end is not None:
            changes.setdefault(block.end, []).append((block.category, -block.bytes))
    for category, more in changes.pop(-1, []):
        level[category] += more
    found: dict[tuple[int, str], Phase] = {}
    line: list[tuple[int, tuple[int, ...]]] = []
    for part in parts_:
        it = found.setdefault((part.step, part.phase), Phase(part.step, part.phase))
        it.spans.append((events[part.begin].ns, events[min(part.end, len(events) - 1)].ns))
        for i in range(part.begin, part.end):
            if i > part.begin and i not in changes:
                continue
            for category, more in changes.get(i, []):
                level[category] += more
            if (total := sum(level.values())) > it.peak:
                it.peak, it.at_peak = total, dict(level)
            line.append((events[i].ns, tuple(level.values())))
    return list(found.values()), line


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
