"""Which phase of a step an event is in, from what autograd and the optimizer say of themselves.

A backward is what autograd evaluates in one go; an update is from there to the end of the optimizer's step (sums over
ranks, clipping and the step itself); a forward is what leads to a backward. What stands in an explicit phase is that
phase's alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainkit.profile.stream import Event, Kind

FORWARD, BACKWARD, OPTIMIZER, OUTSIDE = "forward", "backward", "optimizer", "outside"


@dataclass(slots=True)
class Part:
    """The events `begin` to `end` (not included) are in one phase of one step (-1: in no step)."""

    begin: int
    end: int
    step: int
    phase: str
    sequence: int = -1  # of a backward: the largest of its nodes


def parts(events: Sequence[Event]) -> list[Part]:
    """All events, without a gap, in their phases."""
    stepped = any(event.kind is Kind.STEP for event in events)
    whole: list[Part] = []
    for region in _regions(events):
        named = _named(events, region)
        if stepped and region.step < 0:
            named = [p for p in named if p.phase not in (FORWARD, BACKWARD, OPTIMIZER)]
        whole += _without_gaps(region, named, OUTSIDE if stepped and region.step < 0 else FORWARD)
    return whole


def _regions(events: Sequence[Event]) -> list[Part]:
    """The steps and what lies between them."""
    found, begin = [], 0
    for i, event in enumerate(events):
        if event.kind is Kind.STEP:
            found.append(Part(begin, i, -1, ""))
            begin = i
        elif event.kind is Kind.STEP_END:
            found.append(Part(begin, i + 1, int(events[begin].text), ""))
            begin = i + 1
    return [*found, Part(begin, len(events), -1, "")]


def _named(events: Sequence[Event], region: Part) -> list[Part]:
    """The parts of a region that name themselves: explicit phases, backwards, optimizers' steps."""
    found: list[Part] = []
    open_: list[tuple[Kind, int]] = []
    for i in range(region.begin, region.end):
        event = events[i]
        if event.kind in _ENDS:
            if not open_:
                begin = i
            open_.append((event.kind, i))
        elif event.kind in _ENDS.values() and open_:
            kind, _ = open_.pop()
            if open_:
                continue
            part = Part(begin, i + 1, region.step, _PHASES.get(kind) or events[begin].text, events[begin].sequence)
            last = found[-1] if found else None
            if kind is Kind.NODE and last and last.phase == BACKWARD and part.sequence <= last.sequence:
                last.end = part.end  # one more node of the same backward
            else:
                found.append(part)
    return found


_ENDS = {
    Kind.PHASE: Kind.PHASE_END,
    Kind.NODE: Kind.NODE_END,
    Kind.UPDATE: Kind.UPDATE_END,
    Kind.ZERO: Kind.ZERO_END,
}
_PHASES = {Kind.NODE: BACKWARD, Kind.UPDATE: OPTIMIZER, Kind.ZERO: OPTIMIZER}


def _without_gaps(region: Part, named: Sequence[Part], otherwise: str) -> list[Part]:
    whole: list[Part] = []
    at, before = region.begin, ""
    for part in named:
        if part.begin > at:
            leads_to = OPTIMIZER if part.phase == OPTIMIZER else FORWARD if part.phase == BACKWARD else before
            whole.append(Part(at, part.begin, region.step, leads_to or otherwise))
        whole.append(part)
        at, before = part.end, part.phase if part.phase in (BACKWARD, OPTIMIZER) else before
    if region.end > at:
        whole.append(Part(at, region.end, region.step, before or otherwise))
    return whole
