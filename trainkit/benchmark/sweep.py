"""From words to cells: `memory=baseline,checkpoint data.batch=8,16` is four runs."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.errors import RefusedError, UserError

if TYPE_CHECKING:
    from trainkit.run import Run

_QUOTED_OR_MARK = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[\[\](){},]")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its overrides, those of them that set it apart, and the run, or why there is none."""

    overrides: tuple[str, ...]
    swept: tuple[str, ...]
    run: "Run | None" = None
    refusal: str | None = None

    @property
    def name(self) -> str:
        """What sets the cell apart, in few words: `checkpoint · bf16 · batch=8`."""
        return " · ".join(_short(word) for word in self.swept) or "the run"

    @property
    def memory(self) -> str:
        """The memory strategies by name, joined with `+`; where none are named, as the run describes them."""
        given = [word.partition("=")[2] for word in self.overrides if word.startswith("memory=")]
        if given:
            return _strategies(given[-1])
        return self.run.memory.describe() if self.run else "baseline"


@dataclass(frozen=True)
class Experiment:
    """Cells that are compared with the first of them."""

    title: str
    cells: tuple[Cell, ...]


def experiment(
    words: list[str], *, title: str = "", zipped: bool = False, config_dir: Path | None = None, lenient: bool = False
) -> Experiment:
    """The cells that `words` make, every one composed, before any of them runs.

    A cell that a rule of the house refuses is a cell with a refusal. With `lenient`, so is one with a word that does not
    exist here.

    Raises:
        UserError: a word is wrong, sweeps to be zipped have different lengths, or every cell is refused.
    """
    cells = tuple(_composed(all_, swept, config_dir, lenient) for all_, swept in _products(words, zipped))
    if all(cell.run is None for cell in cells):
        raise UserError(cells[0].refusal or "nothing to run")
    return Experiment(title, cells)


def values(word: str) -> list[str]:
    """The override for every value of a sweep: `a=1,2` gives `a=1` and `a=2`. Commas in brackets or quotes join.

    Raises:
        UserError: a value is missing.
    """
    key, sign, value = word.partition("=")
    if not sign:
        return [word]
    found, begin, depth = [], 0, 0
    for mark in _QUOTED_OR_MARK.finditer(value):
        text = mark.group()
        depth += (text in ("[", "(", "{")) - (text in ("]", ")", "}"))
        if text == "," and depth == 0:
            found.append(value[begin : mark.start()])
            begin = mark.end()
    found.append(value[begin:])
    if len(found) > 1 and not all(v.strip() for v in found):
        raise UserError(f"'{word}' has a comma with nothing beside it: write {key}=A,B")
    return [f"{key}={v.strip() if len(found) > 1 else v}" for v in found]


def _products(words: list[str], zipped: bool) -> list[tuple[list[str], list[str]]]:
    """For every cell its words, and those that come from a sweep."""
    choices = [values(word) for word in words]
    sweeps = [i for i, found in enumerate(choices) if len(found) > 1]
    if zipped and len({len(choices[i]) for i in sweeps}) > 1:
        lengths = ", ".join(f"{words[i]} has {len(choices[i])}" for i in sweeps)
        raise UserError(f"sweeps that are zipped need equally many values: {lengths}")
    combined = (
        zip(*(choices[i] for i in sweeps)) if zipped and sweeps else itertools.product(*(choices[i] for i in sweeps))
    )
    cells = []
    for picked in combined:
        chosen = dict(zip(sweeps, picked))
        cells.append(([chosen.get(i, words[i]) for i in range(len(words))], list(picked)))
    return cells


def _composed(words: list[str], swept: list[str], config_dir: Path | None, lenient: bool) -> Cell:
    from trainkit import run as runs

    try:
        return Cell(tuple(words), tuple(swept), runs.composed(words, config_dir))
    except RefusedError as error:
        return Cell(tuple(words), tuple(swept), refusal=str(error))
    except UserError as error:
        if not lenient:
            raise
        return Cell(tuple(words), tuple(swept), refusal=str(error))


def _strategies(value: str) -> str:
    """`[baseline,checkpoint,8bit]` -> `checkpoint+8bit`: the baseline is what others are added to."""
    names = value.strip("[]").replace(",", "+").replace(" ", "")
    return names.removeprefix("baseline+")


def _short(word: str) -> str:
    """`memory=checkpoint` -> `checkpoint`; `data.batch=8` -> `batch=8`: a group's choice says which group it is of."""
    key, _, value = word.lstrip("+").partition("=")
    if key == "memory":
        return _strategies(value)
    return f"{key.rpartition('.')[2]}={value}" if "." in key or value.replace(".", "").isdigit() else value
