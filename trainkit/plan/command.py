"""The verb `plan`."""

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from trainkit.errors import DONE, FAILED, UserError

SEARCH_S = 45.0


def add_to(app: typer.Typer, words: Any, folder: Any) -> None:
    """Give `app` the verb. `words` and `folder` are how it takes overrides and a folder of choices."""

    @app.command()
    def plan(
        overrides: words = None,
        gpu: Annotated[
            str | None, typer.Option(help="h100, rtx4090, a100-40, 24GB, cpu; default: what is here.")
        ] = None,
        gpus: Annotated[str | None, typer.Option(help="Several, such as 8xh100, or 8 beside --gpu.")] = None,
        search: Annotated[bool, typer.Option("--search", help="Find what fits, though this may fit already.")] = False,
        search_s: Annotated[
            float, typer.Option(min=1, help="The seconds in which the plan and a search end.")
        ] = SEARCH_S,
        json_: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
        price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of one GPU.")] = None,
        efficiency: Annotated[
            float | None, typer.Option(min=0.01, max=1, help="Share of the peak that large matrix products reach.")
        ] = None,
        one_document: Annotated[bool, typer.Option("--one-document", help="No row holds two documents.")] = False,
        check: Annotated[bool, typer.Option("--check", help="Leave with exit code 1 when it does not fit.")] = False,
        config_dir: folder = None,
    ) -> None:
        """Will it fit, how fast, what would fit: before anything runs, and with no GPU."""
        name, ranks = cards(gpu, gpus)
        fits = planned(
            overrides or [], config_dir, name, ranks, efficiency, price, not one_document, search, search_s, json_
        )
        raise typer.Exit(DONE if fits or not check else FAILED)


def cards(gpu: str | None, gpus: str | None) -> tuple[str | None, int]:
    """The card's name and how many of them.

    Raises:
        UserError: `gpus` is not a number of them, or they are named twice.
    """
    if gpus is None:
        return gpu, 1
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x(.+))?", gpus)
    if not match:
        raise UserError(f"--gpus {gpus} is not a number of GPUs: write --gpus 8xh100, or --gpus 8 beside --gpu h100")
    if match[2] and gpu and match[2] != gpu:
        raise UserError(f"--gpus {gpus} and --gpu {gpu} name different GPUs: give one of them")
    return match[2] or gpu, int(match[1])


def planned(
    overrides: list[str],
    config_dir: Path | None,
    gpu: str | None,
    ranks: int,
    efficiency: float | None,
    price: float | None,
    documents: bool,
    search: bool,
    search_s: float,
    json_: Path | None,
) -> bool:
    """Print the plan, search where that is wanted or needed, write the JSON; whether the run fits as it is."""
    from trainkit import run as runs
    from trainkit.plan import cards as known
    from trainkit.plan import report
    from trainkit.plan.planned import Setting, check, plan
    from trainkit.plan.search import Search, most_rows_that_fit

    began = time.monotonic()
    run = runs.composed(overrides, config_dir)
    setting = Setting(known.find(gpu), ranks, efficiency, documents, price)
    several = ranks > 1 and run.parallel.kind == "single" and not run.parallel.given()
    if not (search and several):
        run = check(run, setting)
    cells, fits = [], False
    if not (search and several):
        made = plan(run, setting)
        fits = made.fits
        report.show(made, run.memory.describe(), most_rows_that_fit(made, run, setting))
        cells.append(report.cell(made, overrides, run.memory.describe()))
    if search or not fits:
        left = max(search_s - (time.monotonic() - began), search_s / 2)
        seeking = Search(overrides, config_dir, setting, left, _tell)
        found = seeking.best()
        report.show_found(found, seeking.cut_short)
        for f in found:
            cells.append({**report.cell(f.plan, f.overrides, f.memory), "grade": f.grade, "command": report.command(f)})
    if json_ is not None:
        report.write(json_, cells)
    return fits


def _tell(what: str) -> None:
    """Say what a search is at, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[Ktrying {what}", end="\r", file=sys.stderr, flush=True)
