"""trainkit checkpoint VERB."""

from pathlib import Path
from typing import Annotated

import typer

from trainkit.cli_options import RUNS, Json, Runs, Which, Words, leave

looking_after = typer.Typer(
    no_args_is_help=True, help="Look after checkpoints: verify, show, diff, average, merge, prune, copy."
)


@looking_after.command()
def verify(
    checkpoint: Which = "latest",
    everything: Annotated[bool, typer.Option("--all", help="All of the run's; without a run, all there are.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Hash every byte. Exit code 74 when one is not good."""
    from trainkit import checkpoints

    leave(checkpoints.verify(checkpoint, runs, everything=everything))


@looking_after.command("show")
def show_checkpoint(checkpoint: Which = "latest", json_: Json = False, runs: Runs = RUNS) -> None:
    """What a checkpoint says of itself: step, metric, versions, tensors, files."""
    from trainkit import checkpoints

    checkpoints.show(checkpoint, runs, as_json=json_)


@looking_after.command()
def diff(first: str, second: str, json_: Json = False, runs: Runs = RUNS) -> None:
    """What changed between two checkpoints: config, tensors, how far weights moved."""
    from trainkit import checkpoints

    checkpoints.diff(first, second, runs, as_json=json_)


@looking_after.command()
def average(
    which: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Two or more.")],
    out: Annotated[str, typer.Option(help="The name of the run that holds the average.")],
    runs: Runs = RUNS,
) -> None:
    """The mean of several checkpoints' weights, as a run of its own."""
    from trainkit import checkpoints

    checkpoints.average(which, out, runs)


@looking_after.command()
def merge(
    checkpoint: Which,
    name: Annotated[str, typer.Option(help="The name of the run that holds the model.")],
    runs: Runs = RUNS,
) -> None:
    """A model and its adapter as one model, as a run of its own."""
    from trainkit import merge

    merge.merge(checkpoint, name, runs)


@looking_after.command()
def prune(
    run: str,
    overrides: Words = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Show what the run's policy (or checkpoint.keep=... given here) would remove, ask, and remove it."""
    from trainkit import checkpoints

    checkpoints.prune(run, overrides or [], runs, yes=yes)


@looking_after.command()
def copy(
    source: Annotated[str, typer.Argument(help="A checkpoint here, or an address such as s3://bucket/runs/RUN.")],
    target: Annotated[str, typer.Argument(help="An address such as s3://bucket/runs, or a folder of runs.")],
    runs: Runs = RUNS,
) -> None:
    """A checkpoint from here to somewhere else or back, verified on both sides."""
    from trainkit import checkpoints

    checkpoints.copy(source, target, runs)


@looking_after.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A torch.save file or a torch.distributed.checkpoint folder.")],
    name: Annotated[str, typer.Option(help="The run to make of it.")],
    overrides: Words = None,
    runs: Runs = RUNS,
) -> None:
    """Weights from others' checkpoints, as the first checkpoint of a new run. Executes nothing that is in them."""
    from trainkit import checkpoints

    checkpoints.imported(source, name, overrides or [], runs)
