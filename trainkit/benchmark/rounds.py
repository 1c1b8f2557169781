"""Cells take turns: A, B, C, A, B, C, each time in a fresh process that has the machine to itself.

Fresh processes, because a cell then meets the memory that a run of its own would meet: on a GPU, long-lived ones would hold
each other's share, and the first to be refused would depend on its neighbours. Starting again also lets what differs from
start to start (where memory lies, on which cores threads land) enter the spread. It costs an import and the warm-up a
round; what torch.compile made lies in its cache on disk from the first round on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.benchmark.sweep import Cell, Experiment

Run = Callable[[dict[str, Any], int], dict[str, Any]]
Watch = Callable[[int, "Measured", dict[str, Any] | None], None]


@dataclass(frozen=True)
class Settings:
    """How often and how long: `warmup` steps are dropped in every round, `steps` are timed."""

    rounds: int = 3
    steps: int = 5
    warmup: int = 2
    ranks: int = 1
    threads: int | None = None  # of every process; None: as there are


@dataclass
class Measured:
    """A cell and what each of its rounds found."""

    experiment: Experiment
    cell: Cell
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def going_on(self) -> bool:
        """Whether another round makes sense."""
        return self.cell.run is not None and all(found["status"] == "ok" for found in self.rounds)

    def ranks(self, started: int) -> int:
        """How many processes train the cell."""
        return started if self.cell.run is not None and shares(self.cell.run) else 1


def shares(run: Any) -> bool:
    """Whether several processes train it together."""
    return run.parallel.kind != "single" or bool(run.parallel.given())


def every(experiments: Sequence[Experiment]) -> list[Measured]:
    """All cells in their order, of which nothing is known yet."""
    return [Measured(experiment, cell) for experiment in experiments for cell in experiment.cells]


def measure(
    cells: Sequence[Measured],
    settings: Settings,
    *,
    config_dir: Path | None = None,
    watch: Watch = lambda number, it, found: None,
    run: Run,
) -> None:
    """Give every cell its rounds. One that did not end well has no more of them.

    The memory is followed in the first round alone: it is the same in all. `watch` is told of every turn twice: before it,
    and with what it found. `run` takes a cell's spec and its number of processes, as `process.run` does.
    """
    for number in range(settings.rounds):
        for it in cells:
            if not it.going_on:
                continue
            watch(number, it, None)
            spec = {
                "overrides": list(it.cell.overrides),
                "config_dir": str(config_dir.resolve()) if config_dir else None,
                "warmup": settings.warmup,
                "steps": settings.steps,
                "memory": number == 0,
                "threads": settings.threads,
            }
            it.rounds.append(run(spec, it.ranks(settings.ranks)))
            watch(number, it, it.rounds[-1])
