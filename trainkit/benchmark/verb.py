"""The verb `benchmark`: what is wrong is found first, then the cells take turns, then the figures go where they were asked."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Left

from trainkit import build, hardware
from trainkit.benchmark import against, process, rounds, suites, table
from trainkit.benchmark.document import document
from trainkit.benchmark.outputs import Outputs
from trainkit.benchmark.rounds import Measured, Settings, shares
from trainkit.benchmark.sweep import Cell, Experiment, experiment
from trainkit.errors import DONE, FAILED, UserError
from trainkit.plan.world import started
from trainkit.progress import bytes_bar
from trainkit.units import human_bytes


@dataclass(frozen=True)
class Asked:
    """What a person typed. `rounds`, `steps` and `warmup` are None where the suite, or the default, decides."""

    words: Sequence[str]
    suite: str | None = None
    rounds: int | None = None
    steps: int | None = None
    warmup: int | None = None
    seed: int | None = None
    zipped: bool = False
    ranks: int | None = None  # of cells that share; None: every GPU that is here, or two processes
    against: Path | None = None
    config_dir: Path | None = None

    def settings(self) -> Settings:
        """How often and how long."""
        usual = suites.named(self.suite).settings if self.suite else Settings()
        given = {name: getattr(self, name) for name in ("rounds", "steps", "warmup")}
        return replace(
            usual, ranks=self.ranks or 1, **{name: value for name, value in given.items() if value is not None}
        )

    def experiments(self) -> list[Experiment]:
        """Every cell, composed.

        Raises:
            UserError: a word is wrong.
        """
        more = [*self.words, *([f"seed={self.seed}"] if self.seed is not None else [])]
        if self.suite is None:
            return [experiment(more, zipped=self.zipped, config_dir=self.config_dir)]
        own = {word.partition("=")[0] for word in more}  # a person's word stands for the suite's
        return [
            experiment(
                [*(word for word in given if word.partition("=")[0] not in own), *more],
                title=title,
                zipped=self.zipped,
                config_dir=self.config_dir,
                lenient=True,
            )
            for title, given in suites.named(self.suite).experiments
        ]

    def command(self) -> str:
        """The command that measures the same again."""
        numbers = {
            "--suite": self.suite,
            "--rounds": self.rounds,
            "--steps": self.steps,
            "--warmup": self.warmup,
            "--seed": self.seed,
            "--nproc": self.ranks,
            "--zip": "" if self.zipped else None,
        }
        options = [word for k, v in numbers.items() if v is not None for word in (k, str(v)) if word]
        return shlex.join(["trainkit", "benchmark", *self.words, *options])


def benchmark(asked: Asked, outputs: Outputs) -> int:
    """Measure, print a table, and write the files. The exit code: 1 where a cell failed; running out of memory and being
    refused are results.

    Raises:
        UserError: something that was typed cannot be: found before anything is measured.
    """
    outputs.check()
    earlier = against.read(asked.against) if asked.against else None
    settings, experiments = asked.settings(), asked.experiments()
    every = [cell for it in experiments for cell in it.cells]
    settings = _shared(every, settings, asked.ranks)
    _check(every, settings)
    _prepare(every)
    measured: list[Measured] = rounds.every(experiments)
    try:
        with _watching(settings, measured) as watch:
            rounds.measure(measured, settings, config_dir=asked.config_dir, watch=watch, run=process.run)
    finally:  # also what was measured until Ctrl-C
        if any(it.rounds for it in measured):
            found = document(measured, settings, command=asked.command())
            if earlier:
                against.compare(found, earlier)
            table.show(found, Console(highlight=False))
            for path in outputs.write(found):
                print(f"wrote {path}", file=sys.stderr)
    return FAILED if any(found["status"] == "failed" for it in measured for found in it.rounds) else DONE


def _shared(cells: Sequence[Cell], settings: Settings, asked: int | None) -> Settings:
    """With so many ranks as were asked for, else as cells that share can have here. On a CPU all processes then have equally
    many threads, those of one rank: else a cell alone would have the cores of all."""
    shared = [cell.run for cell in cells if cell.run and shares(cell.run)]
    if not shared:
        return settings
    device = hardware.choose(shared[0].parallel.device)
    ranks = asked or max(2, hardware.count(device))
    threads = max(1, len(os.sched_getaffinity(0)) // ranks) if device.type == "cpu" and ranks > 1 else None
    return replace(settings, ranks=ranks, threads=threads)


def _check(cells: Sequence[Cell], settings: Settings) -> None:
    """Refuse what every process would only find out for itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "torchrun started this, and every cell starts processes of its own: use `trainkit benchmark --nproc N`"
        )
    runs = [cell.run for cell in cells if cell.run]
    for run in runs:
        with started(settings.ranks if shares(run) else 1, settings.ranks):
            build.check(run)
        device = hardware.choose(run.parallel.device)
        here = hardware.count(device)
        if device.type == "cuda" and shares(run) and settings.ranks > here:
            raise UserError(f"--nproc {settings.ranks}: there {'is 1 GPU' if here == 1 else f'are {here} GPUs'} here")
    if settings.ranks > 1 and not any(shares(run) for run in runs):
        raise UserError(f"--nproc {settings.ranks} is for parallel=ddp, fsdp and the like, and no cell is so")


def _prepare(cells: Sequence[Cell]) -> None:
    """Text that is not prepared yet is prepared once, here, and not by the first cell that meets it."""
    seen: list[Any] = []
    with bytes_bar() as report:
        for run in (cell.run for cell in cells if cell.run):
            if run.data not in seen:
                run.data.open(report)
                seen.append(run.data)


@contextmanager
def _watching(settings: Settings, measured: Sequence[Measured]) -> Iterator[rounds.Watch]:
    """A bar on a terminal, and a line a turn where there is none; both on stderr."""
    console = Console(stderr=True, highlight=False)
    total = settings.rounds * sum(it.going_on for it in measured)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def watch(number: int, it: Measured, found: dict[str, Any] | None) -> None:
            where = f"round {number + 1} of {settings.rounds}: " if settings.rounds > 1 else ""
            title = f"{it.experiment.title}: " if it.experiment.title else ""
            if found is None:
                progress.update(task, description=f"{where}{title}{it.cell.name}")
                return
            progress.advance(task, 1 if found["status"] == "ok" else settings.rounds - number)
            progress.console.print(f"{where}{title}{it.cell.name}: {_said(found)}", markup=False, soft_wrap=True)

        yield watch


def _said(found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return f"{found['status']}: {found['error']}"
    rate = found["tokens_per_step"] * found["steps"] / found["seconds"]
    peak = f", {human_bytes(found['memory']['peak'])} at the peak" if "memory" in found else ""
    return f"{rate:,.0f} tokens/s{peak}"
