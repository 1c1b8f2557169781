"""`trainkit benchmark` for the command line: nothing heavy is imported before it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Complete = Callable[[str], list[str]]


def completing(one: Complete) -> Complete:
    """Completion of a sweep: what completes one choice completes the last of several."""

    def complete(incomplete: str) -> list[str]:
        group, sign, start = incomplete.partition("=")
        before, comma, last = start.rpartition(",")
        found = one(f"{group}{sign}{last}")
        return [f"{group}={before}{comma}{word.partition('=')[2]}" for word in found] if comma else found

    return complete


def register(app: typer.Typer, complete: Complete) -> None:
    """Add the verb to `app`; `complete` completes one override."""
    words = Annotated[list[str] | None, typer.Argument(metavar="[OVERRIDES]...", autocompletion=completing(complete))]

    @app.command()
    def benchmark(
        overrides: words = None,
        suite: Annotated[str | None, typer.Option(help="Experiments by name, such as seeds.")] = None,
        rounds: Annotated[int | None, typer.Option(min=1, help="How often each cell takes its turn (3).")] = None,
        steps: Annotated[int | None, typer.Option(min=1, help="Steps timed in each turn (5).")] = None,
        warmup: Annotated[int | None, typer.Option(min=0, help="Steps before them that do not count (2).")] = None,
        seed: Annotated[int | None, typer.Option(min=0, help="The seed of every cell.")] = None,
        zipped: Annotated[bool, typer.Option("--zip", help="Sweeps go side by side: no product of them.")] = False,
        nproc: Annotated[
            int | None, typer.Option(min=1, help="Processes of cells that share (every GPU, or two).")
        ] = None,
        against: Annotated[Path | None, typer.Option(help="An earlier --json FILE to compare with.")] = None,
        json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
        csv: Annotated[Path | None, typer.Option(help="Write a line a cell here.")] = None,
        png: Annotated[Path | None, typer.Option(help="Draw a picture here.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write a page here that needs nothing else.")] = None,
        out: Annotated[Path | None, typer.Option(help="Write all of these into this folder.")] = None,
        config_dir: Annotated[Path | None, typer.Option(help="A folder with groups and choices of your own.")] = None,
    ) -> None:
        """Measure runs side by side: time, memory by category, and whether they learn the same.

        Commas make a sweep of any override: memory=baseline,checkpoint precision=fp32,bf16 data.batch=8,16
        """
        from trainkit.benchmark import verb
        from trainkit.benchmark.outputs import Outputs

        asked = verb.Asked(overrides or [], suite, rounds, steps, warmup, seed, zipped, nproc, against, config_dir)
        if code := verb.benchmark(asked, Outputs.of(out, json=json, csv=csv, png=png, html=html)):
            raise typer.Exit(code)
