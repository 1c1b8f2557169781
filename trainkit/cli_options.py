"""The options and words that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

from trainkit.choices import ANY_OF_SEVERAL, choices


def complete(incomplete: str) -> list[str]:
    """Groups, and after `group=` their choices."""
    group, sign, start = incomplete.partition("=")
    known = choices()
    if not sign:
        return [f"{g}=" for g in known if g.startswith(group)]
    joined, plus, last = start.rpartition("+") if group in ANY_OF_SEVERAL else ("", "", start)
    return [f"{group}={joined}{plus}{c}" for c in known.get(group, []) if c.startswith(last)]


Words = Annotated[list[str] | None, typer.Argument(metavar="[OVERRIDES]...", autocompletion=complete)]
Runs = Annotated[Path, typer.Option("--runs", envvar="TRAINKIT_RUNS", help="The folder that holds the runs.")]
ConfigDir = Annotated[Path | None, typer.Option(help="A folder with groups and choices of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RUNS = Path("runs")
Which = Annotated[str, typer.Argument(metavar="[latest|best|RUN|RUN/step-N|PATH]")]
Quantize = Annotated[
    str | None, typer.Option(help="Hold the blocks' weights in int8, int4 or nf4: less memory, nearly the same loss.")
]


def leave(code: int) -> None:
    """End with this exit code, if it is one of a failure."""
    if code:
        raise typer.Exit(code)
