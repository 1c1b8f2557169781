"""Ways to do a run that a search may try: every set of memory strategies that goes together, in the run's own precision and
in others, and adapters. New ones are found in `conf/`, and judged by their `grade` alone.

A run is composed once a choice. Of many choices it is put together from those, which takes a thousandth of the time; what
cannot go together is refused by the run itself, as ever.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from trainkit import run as runs
from trainkit.choices import choices
from trainkit.models import Decoder
from trainkit.plan.meshes import meshes
from trainkit.plan.planned import Setting
from trainkit.run import Run

GRADES = ("exact", "reordered", "approximate", "changes what is learned")
PRECISIONS = ("bf16", "bf16_pure", "fp8", "fp16")  # and only what conf/precision has of them
WITH_MANY = [
    (),
    ("checkpoint",),
    ("selective",),
    ("8bit", "checkpoint"),
]  # tried on every mesh; all others with ddp and fsdp
START = "CHECKPOINT"  # where a person has to say what an adapter learns beside
NEUTRAL = ["clip=0", "precision=fp32"]  # with which every strategy goes


@dataclass(frozen=True)
class Candidate:
    """A way to run, its command line without the verb, and those words of it that change what is learned."""

    run: Run
    overrides: tuple[str, ...]
    grade: str
    changes: tuple[str, ...] = ()


class Candidates:
    """Of a person's `overrides`, in which memory strategies, and maybe more, are replaced."""

    def __init__(self, overrides: Sequence[str], config_dir: Path | None, setting: Setting) -> None:
        self._overrides, self._config_dir, self._setting = list(overrides), config_dir, setting
        self._known = choices(config_dir)
        self._before = runs.composed(self._overrides, config_dir)

    def __iter__(self) -> Iterator[Candidate]:
        strategies, own = self._strategies(), self._composed()
        if self._setting.ranks == 1 or own.parallel.given():  # which a person chose
            yield from self._all(self._ways(own), strategies, [])
            return
        few = [one for one in strategies if one[0] in WITH_MANY]
        for learned, run in self._of_many(own):
            for words, meshed in meshes(run, self._setting.ranks):
                plain = not meshed.parallel.given() and run.data == own.data
                if plain or run.model == own.model:
                    yield from self._all([(learned, meshed)], strategies if plain else few, words)

    def _all(self, ways: Iterable[tuple[list[str], Run]], strategies: Any, parallel: list[str]) -> Iterator[Candidate]:
        for words, run in ways:
            for names, values in strategies:
                if found := self._made(run, names, values, words, parallel):
                    yield found

    def _of_many(self, own: Run) -> Iterator[tuple[list[str], Run]]:
        """What is learned, as it is, in other precisions, and by a batch that gives every rank a row, where nobody said how
        many rows it has."""
        ways = [(words, run) for words, run in self._ways(own) if "clip=0" not in words]
        yield from ways
        said = any(_key(word) == "data.batch" for word in self._overrides)
        if own.data.batch < self._setting.ranks and not said:
            data = replace(own.data, batch=self._setting.ranks)
            for words, run in ways[: 1 + len(PRECISIONS)]:
                if larger := _replaced(run, data=data):
                    yield [*words, f"data.batch={self._setting.ranks}"], larger

    def _composed(self) -> Run:
        return runs.composed(self._words((), [], []), self._config_dir)

    def _strategies(self) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
        """Sets of strategies that set different fields, the smallest first, and what they set."""
        plain = runs.composed(NEUTRAL, self._config_dir).memory
        of_field: dict[str, list[tuple[str, Any]]] = {}
        for name in self._known["memory"]:
            own = [w for w in self._overrides if _key(w).startswith(f"memory.{name}.")]
            memory = runs.composed([*NEUTRAL, f"memory={name}", *own], self._config_dir).memory
            changed = [f.name for f in fields(memory) if getattr(memory, f.name) != getattr(plain, f.name)]
            if len(changed) == 1 and hasattr(value := getattr(memory, changed[0]), "grade"):
                of_field.setdefault(changed[0], []).append((name, value))
        found = []
        for chosen in product(*([None, *options] for options in of_field.values())):
            some = {field: one for field, one in zip(of_field, chosen, strict=True) if one is not None}
            values = {field: value for field, (_, value) in some.items()}
            found.append((tuple(sorted(name for name, _ in some.values())), values))
        return sorted(found, key=lambda one: (len(one[0]), one[0]))

    def _ways(self, own: Run) -> Iterator[tuple[list[str], Run]]:
        """What is learned, as it is and in other ways, with the words that say so."""
        card = self._setting.card
        wanted = {
            "bf16": own.precision.compute != "bfloat16" and card.bf16 > own_rate(own, card),
            "bf16_pure": own.precision.params != "bfloat16" and card.bf16 >= own_rate(own, card),
            "fp8": own.precision.float8 is None and card.cuda and card.fp8 > max(card.bf16, card.fp16),
            "fp16": own.precision.compute != "float16" and card.fp16 > card.bf16,
        }
        precisions: list[tuple[list[str], Run]] = [([], own)]
        for name in PRECISIONS:
            if name in self._known["precision"] and wanted[name]:
                other = runs.composed([*NEUTRAL[:1], f"precision={name}"], self._config_dir).precision
                if run := _replaced(own, precision=other):
                    precisions.append(([f"precision={name}"], run))
        yield from precisions
        for words, run in precisions:
            if run.clip > 0 and (still := _replaced(run, clip=0.0)):
                yield [*words, "clip=0"], still
        beside = [precisions[:2][-1], *(one for one in precisions[2:] if one[1].precision.params == "bfloat16")]
        if not isinstance(own.model, Decoder) or own.model.adapter is not None:
            return
        for name, (words, run) in product(self._known["model.adapter"], beside):
            start = [] if own.start_from else [f"start_from={START}"]
            adapted = runs.composed([f"model.adapter={name}", f"start_from={START}"], self._config_dir).model
            assert isinstance(adapted, Decoder)
            model = replace(own.model, adapter=adapted.adapter)
            if frozen := _replaced(run, model=model, start_from=own.start_from or START):
                yield [*words, f"model.adapter={name}", *start], frozen

    def _made(
        self, run: Run, names: tuple[str, ...], values: dict[str, Any], words: list[str], parallel: list[str]
    ) -> Candidate | None:
        """The run with these strategies; None where they cannot go together, or there is no reason for `words`."""
        if "clip=0" in words and "step_in_backward" not in values:
            return None
        memory = replace(run.memory, microbatch=None, **values)
        made = _replaced(run, memory=memory)
        if made is None:
            return None
        grade = grade_of(made) if not words else GRADES[-1]
        return Candidate(made, tuple(self._words(names, parallel, words)), grade, tuple(words))

    def _words(self, names: tuple[str, ...], parallel: list[str], more: list[str]) -> list[str]:
        """A person's overrides, with these strategies instead of theirs."""
        dropped = {"memory", "memory.microbatch"} | {_key(word) for word in [*more, *parallel]}
        others = {f"memory.{name}" for name in self._known["memory"] if name not in names}
        kept = [
            w
            for w in self._overrides
            if (key := _key(w)) not in dropped
            and not any(key == other or key.startswith(f"{other}.") for other in others)
            and not any(key.startswith(f"{group}.") and group == "precision" for group in dropped)
        ]
        memory = [f"memory={'+'.join(names)}"] if names else []
        return [*kept, *memory, *more, *parallel]


def own_rate(run: Run, card: Any) -> float:
    """TFLOP/s of the matrix products of `run`."""
    return float(card.rate(run.precision.matmul_dtype(), run.precision.tf32)) / 1e12


def grade_of(run: Run) -> str:
    """The worst grade of neutrality among a run's memory strategies."""
    strategies = [getattr(run.memory, f.name) for f in fields(run.memory)]
    grades = [s.grade for s in strategies if hasattr(s, "grade")]
    return max(grades, key=GRADES.index, default="exact")


def _replaced(run: Run, **changes: Any) -> Run | None:
    try:
        return replace(run, **changes)
    except ValueError:  # which a run raises of what cannot go together
        return None


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].replace("/", ".")
