"""What would fit: memory strategies and their combinations, each with the largest microbatch that leaves it on the device,
then other precisions. New strategies are found in `conf/memory`, and judged by their `grade` alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

from trainkit import run as runs
from trainkit.choices import choices
from trainkit.errors import UserError
from trainkit.plan.planned import KNOWN, Plan, Setting, plan, with_microbatch
from trainkit.run import Run

GRADES = ("exact", "reordered", "approximate", "changes what is learned")
AT_ONCE = 2  # strategies of which every combination is tried; more only beside those that need the least
BEAM = 4
PRECISIONS = ("bf16", "fp16")  # and only what conf/precision has of them
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A way to run, its command line without the verb, and what it takes."""

    overrides: tuple[str, ...]
    grade: str
    plan: Plan

    @property
    def key(self) -> tuple[bool, int, float]:
        """What fits first, exact first, fast first."""
        return (not self.plan.fits, GRADES.index(self.grade), self.plan.step_s)


def largest_microbatch(of: Callable[[int], Plan], rows: int) -> Plan | None:
    """The plan of the largest microbatch that fits, of all rows or a power of two; None where one row does not."""
    sizes = sorted({rows, *(1 << i for i in range(rows.bit_length()) if 1 << i < rows)})
    low, high, best = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high + 1) // 2 if best is None and low == 0 else (low + high) // 2
        found = of(sizes[middle])
        if found.fits:
            best, low = found, middle + 1
        else:
            high = middle - 1
    return best


class Search:
    """Over the strategies of `config_dir` and those that ship, beside `overrides`. It ends after `limit_s` seconds."""

    def __init__(
        self, overrides: Sequence[str], config_dir: Path | None, setting: Setting, limit_s: float, tell: Tell
    ) -> None:
        self._overrides, self._config_dir, self._setting = list(overrides), config_dir, setting
        self._end, self._tell = time.monotonic() + limit_s, tell
        self._known = choices(config_dir)
        self._needed: dict[tuple[str, ...], int] = {}  # at one row, of strategies in what the run computes in
        self.cut_short = False

    def best(self) -> list[Found]:
        """What fits, the best first; where nothing does, what needs the least."""
        before = runs.composed(self._overrides, self._config_dir)
        parallels = [None] if self._setting.ranks == 1 else [k for k in self._known["parallel"] if k in KNOWN]
        found = [f for kind in parallels for f in self._strategies(kind)]
        least = sorted(self._needed, key=lambda names: self._needed[names])[:BEAM]
        for precision in PRECISIONS:
            if precision in self._known["precision"] and (before.precision.compute or "")[:2] != precision[:2]:
                for kind in parallels:
                    found += [f for names in [(), *least] if (f := self._try(names, kind, precision))]
        return sorted(found, key=lambda f: f.key if f.plan.fits else (True, 0, f.plan.needed))

    def _strategies(self, parallel: str | None) -> Iterator[Found]:
        every = [name for name in self._known["memory"] if name not in ("baseline", "default")]
        tried = [names for size in range(AT_ONCE + 1) for names in combinations(every, size)]
        while tried:
            for names in tried:
                if found := self._try(names, parallel):
                    yield found
            size = len(tried[-1])
            rest = [n for n in self._needed if len(n) == size]
            beam = sorted(rest, key=lambda n: self._needed[n])[:BEAM] if size < len(every) else []
            wider = {tuple(sorted({*names, more})) for names in beam for more in every if more not in names}
            tried = sorted(wider) if not self._has_fitted(size) else []

    def _has_fitted(self, size: int) -> bool:
        return any(need <= self._setting.card.bytes for names, need in self._needed.items() if len(names) <= size)

    def _try(self, names: tuple[str, ...], parallel: str | None, precision: str | None = None) -> Found | None:
        """The way to run with these strategies, at its best microbatch; None where they cannot go together."""
        if self.cut_short or time.monotonic() > self._end:
            self.cut_short = True
            return None
        self._tell(" + ".join(filter(None, [*names, precision, parallel])) or "baseline")
        words = self._words(names, parallel, precision)
        try:
            run = runs.composed(words, self._config_dir)
            one = plan(with_microbatch(run, 1), self._setting)
        except UserError:
            return None
        if precision is None:
            self._needed[names] = min(one.needed, self._needed.get(names, one.needed))
        mine = run.data.batch // self._setting.ranks
        best = one
        if one.fits:
            best = largest_microbatch(lambda rows: plan(with_microbatch(run, rows), self._setting), mine) or one
        grade = grade_of(run) if precision is None else GRADES[-1]
        micro = [f"memory.microbatch={best.microbatch}"] if best.microbatch < mine else []
        return Found((*words, *micro), grade, best)

    def _words(self, names: tuple[str, ...], parallel: str | None, precision: str | None) -> list[str]:
        """A person's overrides, with these strategies instead of theirs."""
        dropped = {"memory", "memory.microbatch"} | ({"precision"} if precision else set())
        dropped |= {"parallel"} if parallel else set()
        others = {f"memory.{name}" for name in self._known["memory"] if name not in names}
        kept = [
            w
            for w in self._overrides
            if (key := w.lstrip("+~").partition("=")[0]) not in dropped
            and not any(key == other or key.startswith(f"{other}.") for other in others)
        ]
        memory = [f"memory={'+'.join(names)}"] if names else []
        more = [f"{key}={value}" for key, value in (("precision", precision), ("parallel", parallel)) if value]
        return [*kept, *memory, *more]


def grade_of(run: Run) -> str:
    """The worst grade of neutrality among a run's memory strategies."""
    strategies = [getattr(run.memory, f.name) for f in fields(run.memory)]
    grades = [s.grade for s in strategies if hasattr(s, "grade")]
    return max(grades, key=GRADES.index, default="exact")
