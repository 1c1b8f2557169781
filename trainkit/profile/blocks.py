"""Allocations, one by one, and how much was alive at once: from the profiler's stream of events."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainkit.profile.phases import BACKWARD, FORWARD, OPTIMIZER, Part
from trainkit.profile.stream import Event, Kind

PARAMETERS, GRADIENTS, STATES, ACTIVATIONS, TEMPORARY = CATEGORIES = (
    *("parameters", "gradients", "optimizer", "activations", "temporary"),
)
Places = dict[int, tuple[str, int]]  # where known tensors lie: address -> (category, bytes)


@dataclass(slots=True)
class Mark:
    """Where known tensors lie at some place of the stream, and which of the first ones have ended, which nobody reports."""

    places: Places
    ended: set[int]


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
    at: int = -1  # the event after which it was reached
    at_peak: dict[str, int] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (begin, end) of the clock, ns


def read(events: Sequence[Event], parts: Sequence[Part], known: Places, marks: Sequence[Mark]) -> list[Block]:
    """Every allocation with its category; `known` are those that were there before the first event."""
    return _Reader(events, known, marks).blocks(parts)


def alive(blocks: Iterable[Block], at: int) -> list[Block]:
    """What was allocated after the event `at`."""
    return [b for b in blocks if b.begin <= at and (b.end is None or b.end > at)]


class _Reader:
    """From events to blocks with their categories."""

    def __init__(self, events: Sequence[Event], known: Places, marks: Sequence[Mark]) -> None:
        self._events, self._marks = events, marks
        self._before = {pointer: Block(size, -1, category=category) for pointer, (category, size) in known.items()}
        self._live = dict(self._before)  # by address, the oldest first
        self._blocks = list(self._before.values())

    def blocks(self, parts: Sequence[Part]) -> list[Block]:
        begun: list[int] = []
        for part in parts:
            if part.phase == BACKWARD:
                self._are(ACTIVATIONS, since=0, phase=FORWARD)
            for i in range(part.begin, part.end):
                event = self._events[i]
                match event.kind:
                    case Kind.MEMORY:
                        self._memory(i, event, part)
                    case Kind.MARK:
                        mark = self._marks[int(event.text)]
                        self._marked(i, mark)
                        if part.phase == OPTIMIZER:
                            self._communicated(i, mark)
                    case Kind.AGAIN | Kind.UPDATE:
                        begun.append(i)
                    case Kind.AGAIN_END | Kind.UPDATE_END:
                        self._are(STATES if event.kind is Kind.UPDATE_END else ACTIVATIONS, since=begun.pop())
            if part.phase == BACKWARD:
                self._are(GRADIENTS, since=part.begin)
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

    def _marked(self, i: int, mark: Mark) -> None:
        for pointer, (category, _) in mark.places.items():
            if pointer in self._live:
                self._live[pointer].category = category
        for pointer in mark.ended & self._before.keys():
            block = self._before.pop(pointer)
            if self._live.get(pointer) is block:
                block.end = i
                del self._live[pointer]

    def _communicated(self, i: int, mark: Mark) -> None:
        """What FSDP gathers and sums has ended before an update. When gloo's thread was the last to hold it, nobody
        reported that."""
        for pointer, block in list(self._live.items()):
            if pointer not in mark.places and _fsdp(block.made_by):
                block.end = i
                del self._live[pointer]

    def _are(self, category: str, since: int, phase: str = "") -> None:
        """What lives now, was made since then (in that phase) and is not known to be anything else, is of `category`."""
        for block in self._live.values():
            if not block.category and block.begin >= since and phase in ("", block.phase):
                block.category = category


def _fsdp(within: tuple[str, ...]) -> str:
    if any(name.startswith(_GATHERED) for name in within):
        return PARAMETERS
    return GRADIENTS if any(name.startswith(_REDUCED) for name in within) else ""


def levels(
    events: Sequence[Event], parts: Sequence[Part], blocks: Sequence[Block]
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
    for part in parts:
        it = found.setdefault((part.step, part.phase), Phase(part.step, part.phase))
        it.spans.append((events[part.begin].ns, events[min(part.end, len(events) - 1)].ns))
        for i in range(part.begin, part.end):
            if i > part.begin and i not in changes:
                continue
            for category, more in changes.get(i, []):
                level[category] += more
            if (total := sum(level.values())) > it.peak:
                it.peak, it.at, it.at_peak = total, i, dict(level)
            line.append((events[i].ns, tuple(level.values())))
    return list(found.values()), line
