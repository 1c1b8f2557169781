"""What torch's profiler saw, as one list in the order in which it happened: allocations, and where a step's parts begin.

The profiler keeps a tree of operators for each thread, with every allocation and every free of torch's allocator in it
(`profile_memory` of `torch.profiler`). Nothing in a step has to change for it to be read: autograd names each node that it
evaluates, an optimizer names its step, and FSDP what it gathers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch._C._profiler import RecordScope, _EventType

STEP, PHASE, MARK = "trainkit.step ", "trainkit.phase ", "trainkit.mark "


class Kind(Enum):
    """What an event is. One with an `_END` encloses what happens until then."""

    MEMORY = auto()
    MARK = auto()
    STEP, STEP_END = auto(), auto()
    PHASE, PHASE_END = auto(), auto()
    NODE, NODE_END = auto(), auto()  # autograd evaluates one node of a graph
    AGAIN, AGAIN_END = auto(), auto()  # inside a node, a part of a forward is run again
    UPDATE, UPDATE_END = auto(), auto()  # an optimizer's step
    ZERO, ZERO_END = auto(), auto()


_KINDS = {
    STEP: (Kind.STEP, Kind.STEP_END),
    PHASE: (Kind.PHASE, Kind.PHASE_END),
    MARK: (Kind.MARK, None),
    "autograd::engine::evaluate_function: ": (Kind.NODE, Kind.NODE_END),
    "Optimizer.step#": (Kind.UPDATE, Kind.UPDATE_END),
    "Optimizer.zero_grad#": (Kind.ZERO, Kind.ZERO_END),
}


@dataclass(slots=True)
class Event:
    """`bytes` is negative where memory is freed; `within` are the operators that it happens in, the outermost first."""

    ns: int
    kind: Kind
    pointer: int = 0
    bytes: int = 0
    within: tuple[str, ...] = ()
    text: str = ""  # of a step, a phase or a mark
    sequence: int = -1  # of a node: those of a later forward have larger ones


def events(tree: Sequence[Any], device: torch.device) -> list[Event]:
    """All events of the profiler's `tree` that are about `device`, over all of its threads, in order."""
    found: list[Event] = []
    for root in tree:
        _walk(root, (), device, found)
    found.sort(key=lambda event: event.ns)  # stable: what happens in one thread at one time keeps its order
    return found


def _walk(it: Any, within: tuple[str, ...], device: torch.device, found: list[Event]) -> None:
    if it.tag == _EventType.Allocation:
        facts = it.extra_fields
        if facts.device == device and facts.alloc_size:
            found.append(Event(it.start_time_ns, Kind.MEMORY, facts.ptr or 0, facts.alloc_size, within))
        return
    name = it.name
    prefix = next((p for p in _KINDS if name.startswith(p)), None)
    if prefix is None:
        for child in it.children:
            _walk(child, (*within, name), device, found)
        return
    begin, end = _KINDS[prefix]
    text = name.removeprefix(prefix)
    found.append(Event(it.start_time_ns, begin, text=text, sequence=getattr(it.extra_fields, "sequence_number", -1)))
    again = _forward_again(it) if begin is Kind.NODE else None
    if again:
        found.append(Event(again[0], Kind.AGAIN))
    inside = within if begin in (Kind.STEP, Kind.PHASE, Kind.MARK) else (*within, name)
    for child in it.children:
        _walk(child, inside, device, found)
    if again:
        found.append(Event(again[1], Kind.AGAIN_END))
    if end is not None:
        found.append(Event(it.end_time_ns, end))


def _forward_again(node: Any) -> tuple[int, int] | None:
    """When, in a node of a backward, a forward was run again. Its operators record a graph, which a backward's do not, and
    only operators that do have a sequence number."""
    times: list[int] = []
    below = list(node.children)
    while below:
        it = below.pop()
        if it.tag != _EventType.TorchOp or it.name.startswith("autograd::engine::"):
            continue
        if it.extra_fields.scope == RecordScope.FUNCTION and it.extra_fields.sequence_number >= 0:
            times += [it.start_time_ns, it.end_time_ns]
        else:
            below += it.children
    return (min(times), max(times)) if times else None
