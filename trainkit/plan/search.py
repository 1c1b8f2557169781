"""What would fit. Arithmetic leaves out what cannot; of the rest, grade by grade, the ways that can be the fastest are traced
first, each with the most rows at once that leave it on the device, until every grade has some or the time is up."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.plan import planned as planning
from trainkit.plan.bounds import least_bytes, least_seconds, most_rows, row_bytes, sizes_of
from trainkit.plan.candidates import GRADES, Candidate, Candidates
from trainkit.plan.live import OutOfTimeError
from trainkit.plan.planned import Plan, Setting, plan, with_microbatch
from trainkit.run import Run

SHARE = 0.25  # of the time that is left, for one way at most
FIRST = 0.6  # until something is found that fits
ENOUGH, ENOUGH_CHANGED = 4, 1  # ways of a grade, and of a change of what is learned: then no more are looked for
FULL = 4  # microbatches a stage, with which a pipeline stands still little
Tell = Callable[[str], None]
OfRows = Callable[[int], Plan]


@dataclass(frozen=True)
class Found:
    """A way to run, its command line without the verb, and what it takes."""

    overrides: tuple[str, ...]
    grade: str
    plan: Plan
    memory: str

    @property
    def key(self) -> tuple[bool, int, float]:
        """What fits first, exact first, fast first."""
        return (not self.plan.fits, GRADES.index(self.grade), self.plan.step_s)


def planner(run: Run, setting: Setting, *, sure: bool = True, until: float | None = None) -> OfRows:
    """Plans of `run` with so many rows at once; with all of them where updates are made in the backward."""
    whole = run.memory.step_in_backward is not None
    return lambda rows: plan(run if whole else with_microbatch(run, rows), setting, sure=sure, until=until)


def most_rows_that_fit(made: Plan, run: Run, setting: Setting) -> int | None:
    """Of a run that was planned as it is: the most rows at once that fit, None where not even one does. Arithmetic may know."""
    rows, limit = rows_of(run, setting), most_rows(run, setting)
    if not limit or (made.fits and made.microbatch == rows):
        return rows if limit else None
    traced = planner(run, setting, sure=False)
    best = largest_microbatch(lambda n: made if n == made.microbatch else traced(n), rows, limit)
    return best.microbatch if best.fits else None


def rows_of(run: Run, setting: Setting) -> int:
    """The most rows that a rank may have at once: its own, or a microbatch of a pipeline that has as many as stages."""
    sizes = planning.mesh_of(run, setting)
    return max(1, run.data.batch // sizes.data // sizes.pp)


def largest_microbatch(of: OfRows, rows: int, most: int | None = None) -> Plan:
    """The plan of the most rows at once that fit, of all or a power of two; that of one row where not even one fits. More
    than `most` are not tried.

    Bytes are convex in the rows, as the largest of what is linear in them: between two sizes they are below the line. Only all
    rows at once have no gradients of those before them beside them, so that the first line may be too low.
    """
    sizes = [size for size in sizes_of(rows) if size <= (most or rows)]
    largest = of(sizes[-1])
    if largest.fits or sizes[-1] == 1 or not (best := of(1)).fits:
        return largest if largest.fits or sizes[-1] == 1 else best
    one, room = best, best.setting.card.bytes - best.needed
    while len(sizes) > 2:
        slope = (largest.needed - one.needed) / (sizes[-1] - 1)
        below = [size for size in sizes[:-1] if slope * (size - 1) <= room]
        size = max(below[-1], best.microbatch)
        size = size if size > best.microbatch else next((s for s in sizes[:-1] if s > best.microbatch), 0)
        if not size:
            break
        if (found := of(size)).fits:
            best, sizes = found, [1, *(s for s in sizes if s > size)]
        else:
            largest, sizes = found, [s for s in sizes if s <= size]
    return best


class Search:
    """Over all that goes beside `overrides`, that ships or lies in `config_dir`. It ends after `limit_s` seconds."""

    def __init__(
        self, overrides: Sequence[str], config_dir: Path | None, setting: Setting, limit_s: float, tell: Tell
    ) -> None:
        self._setting, self._tell = setting, tell
        self._end, self._limit_s = time.monotonic() + limit_s, limit_s
        self._own = runs.composed(list(overrides), config_dir)
        self._candidates = Candidates(overrides, config_dir, setting)
        self._too_large: dict[tuple[object, ...], tuple[float, int]] = {}
        self._rows: dict[tuple[object, ...], int] = {}  # that fitted, whatever parameters, gradients and states take
        self.cut_short = False
        self.tried = 0
        self._found = False  # something that fits

    def best(self) -> list[Found]:
        """What fits, the best first; where nothing does, what needs the least."""
        left = []
        for candidate in self._candidates:
            if time.monotonic() > self._end:
                self.cut_short = True
                break
            run, setting = candidate.run, self._setting
            if run.memory.offload_activations and not self._own.memory.offload_activations:
                continue  # twice as many sets would be tried
            left.append((most_rows(run, setting), least_bytes(run, setting), least_seconds(run, setting), candidate))
        if any(rows for rows, *_ in left):
            left = [one for one in left if one[0]]
        else:  # then the nearest are of interest
            left = sorted(left, key=lambda one: one[1])[:ENOUGH]
        found: list[Found] = []
        fitted: Counter[tuple[str, ...]] = Counter()
        tries: Counter[tuple[str, ...]] = Counter()

        def turn(one: tuple[int, float, float, Candidate]) -> tuple[int, int, float, float]:
            """Every kind in turn, its fastest first; where that did not fit, what keeps the least for its backward."""
            kind = _kind(one[3])
            kept = row_bytes(one[3].run) if tries[kind] and not fitted[kind] else 0.0
            return tries[kind], GRADES.index(one[3].grade), kept, one[2]

        while left and time.monotonic() < self._end:
            one = min(left, key=turn)
            left.remove(one)
            most, least, _, candidate = one
            if fitted[_kind(candidate)] >= (ENOUGH_CHANGED if candidate.changes else ENOUGH):
                continue
            if self._cannot(candidate, least):
                continue
            tries[_kind(candidate)] += 1
            if (way := self._try(candidate, least, most)) is not None:
                found.append(way)
                fitted[_kind(candidate)] += way.plan.fits
        self.cut_short |= bool(left)
        return sorted(found, key=lambda f: f.key if f.plan.fits else (True, 0, f.plan.needed))

    def _cannot(self, candidate: Candidate, least: float) -> bool:
        """Whether one that holds as much beside parameters, gradients and states was too large with less of those."""
        before, excess = self._too_large.get(_activations(candidate.run), (0.0, 0))
        return excess > 0 and least - before + excess > 0

    def _try(self, candidate: Candidate, least: float, most: int) -> Found | None:
        """The way to run at its best microbatch; None where it cannot be traced, or takes too long."""
        self._tell(" ".join(candidate.overrides))
        run, rows, now = candidate.run, rows_of(candidate.run, self._setting), time.monotonic()
        alike, mesh = _activations(run), planning.mesh_of(run, self._setting)
        share = SHARE if self._found else FIRST
        until = min(self._end, now + max(share * (self._end - now), SHARE * self._limit_s / 2))
        planned = planner(run, self._setting, sure=False, until=until)
        seen: list[Plan] = []

        def of(rows: int) -> Plan:
            seen.append(planned(rows))
            return seen[-1]

        try:
            if run.memory.step_in_backward is not None:
                best = of(rows)
            elif mesh.pp > 1:
                best = largest_microbatch(of, rows, min(most, self._rows.get(alike, most), max(1, rows // FULL)))
            else:
                best = largest_microbatch(of, rows, min(most, self._rows.get(alike, most)))
        except OutOfTimeError:  # what is known by then may do
            self.cut_short = True
            if not (fitted := [plan for plan in seen if plan.fits]):
                return None
            best = max(fitted, key=lambda plan: plan.microbatch)
        except UserError:
            return None
        self.tried += 1
        if best.fits:
            self._found = True
            self._rows[alike] = best.microbatch
        else:
            self._too_large[alike] = least, best.needed - self._setting.card.bytes
        micro = [f"memory.microbatch={best.microbatch}"] if best.microbatch < rows or mesh.pp > 1 else []
        return Found((*candidate.overrides, *micro), candidate.grade, best, run.memory.describe())


def _kind(candidate: Candidate) -> tuple[str, ...]:
    return (candidate.grade, *candidate.changes)


def _activations(run: Run) -> tuple[object, ...]:
    """What a step's memory depends on, beside parameters, gradients and states."""
    memory = run.memory
    states = (memory.states, memory.offload_optimizer)
    others = (getattr(memory, f.name) for f in fields(memory) if f.name not in ("states", "offload_optimizer"))
    return (*others, run.precision, run.model, run.parallel, states if memory.step_in_backward else None)
