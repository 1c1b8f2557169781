"""trainkit VERB [OVERRIDES]. A verb is a function; heavy imports wait until one is called."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainkit import __version__, versions
from trainkit.choices import ANY_OF_SEVERAL, choices
from trainkit.errors import DONE, FAILED, MISTAKE
from trainkit.plan import command as plan_verb

app = typer.Typer(
    name="trainkit",
    help="Train, resume and look after language and embedding models on what you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _complete(incomplete: str) -> list[str]:
    """Groups, and after `group=` their choices."""
    group, sign, start = incomplete.partition("=")
    known = choices()
    if not sign:
        return [f"{g}=" for g in known if g.startswith(group)]
    joined, plus, last = start.rpartition("+") if group in ANY_OF_SEVERAL else ("", "", start)
    return [f"{group}={joined}{plus}{c}" for c in known.get(group, []) if c.startswith(last)]


Words = Annotated[list[str] | None, typer.Argument(metavar="[OVERRIDES]...", autocompletion=_complete)]
Runs = Annotated[Path, typer.Option("--runs", envvar="TRAINKIT_RUNS", help="The folder that holds the runs.")]
ConfigDir = Annotated[Path | None, typer.Option(help="A folder with groups and choices of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RUNS = Path("runs")


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"trainkit {__version__}")
        raise typer.Exit


@app.callback()
def _trainkit(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["TRAINKIT_DEBUG"] = "1"


@app.command()
def train(overrides: Words = None, runs: Runs = RUNS, config_dir: ConfigDir = None) -> None:
    """Start a run, or go on with the run of that name.

    With nothing else said: a tiny model on the embedded corpus, on a CPU, in about a minute.
    """
    from trainkit import signals

    signals.leave_at_once()
    from trainkit import launch, run

    _leave(launch.train(run.composed(overrides or [], config_dir), runs))


@app.command()
def resume(
    which: Annotated[str, typer.Argument(metavar="[latest|best|RUN|PATH|URL]")] = "latest",
    overrides: Words = None,
    runs: Runs = RUNS,
    config_dir: ConfigDir = None,
) -> None:
    """Go on from a run's folder alone. How it is done may change; what is learned may not."""
    from trainkit import signals

    signals.leave_at_once()
    from trainkit import launch

    if "=" in which:
        which, overrides = "latest", [which, *(overrides or [])]
    _leave(launch.resume(which, overrides or [], runs, config_dir))


@app.command("list-checkpoints")
def list_checkpoints(
    run: Annotated[str | None, typer.Argument(help="Only this run's.")] = None, json_: Json = False, runs: Runs = RUNS
) -> None:
    """Show the checkpoints of all runs: tier, step, epoch, loss, size, age, verified or not."""
    from trainkit import show

    show.checkpoints(run, runs, as_json=json_)


@app.command()
def config(
    overrides: Words = None,
    groups: Annotated[bool, typer.Option("--groups", help="Show what can be chosen.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Print the run that the overrides make, or what can be chosen."""
    if groups:
        for group, names in choices(config_dir).items():
            typer.echo(f"{group + ':':13} {', '.join(names)}")
        return
    from trainkit import run

    typer.echo(run.composed(overrides or [], config_dir).yaml(), nl=False)


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files or folders of text, JSONL or Parquet, or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder to write the token shards to.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, bpe, gpt2, cl100k, o200k or a tokenizer.json.")] = "bytes",
    vocab: Annotated[int, typer.Option(min=257, help="Vocabulary of a bpe to train.")] = 4096,
    validation: Annotated[float, typer.Option(help="Fraction of the documents held out.")] = 0.05,
    field: Annotated[str, typer.Option(help="The JSONL field or Parquet column that holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Tokenize and pack text into token shards. Killed in the middle, the same command goes on."""
    from trainkit.prepare import prepare as write

    write(sources, out, tokenizer, vocab, validation, field, workers)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    overrides: Words = None,
    json_: Json = False,
    runs: Runs = RUNS,
) -> None:
    """Loss, perplexity and bits per byte of a checkpoint on its validation split, or on another data=..."""
    from trainkit import use

    use.evaluate(checkpoint, overrides or [], runs, as_json=json_)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from this much probability.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    runs: Runs = RUNS,
) -> None:
    """Write text with a checkpoint."""
    from trainkit import use

    use.generate(checkpoint, prompt, tokens, temperature, top_k, top_p, seed, device, runs)


@app.command()
def doctor(json_: Json = False, runs: Runs = RUNS) -> None:
    """What this machine has and what trainkit can use of it."""
    from trainkit import show

    show.doctor(runs, as_json=json_)


plan_verb.add_to(app, Words, ConfigDir)

looking_after = typer.Typer(
    no_args_is_help=True, help="Look after checkpoints: verify, show, diff, average, prune, copy."
)
app.add_typer(looking_after, name="checkpoint")
Which = Annotated[str, typer.Argument(metavar="[latest|best|RUN|RUN/step-N|PATH]")]


@looking_after.command()
def verify(
    checkpoint: Which = "latest",
    everything: Annotated[bool, typer.Option("--all", help="All of the run's; without a run, all there are.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Hash every byte. Exit code 74 when one is not good."""
    from trainkit import checkpoints

    _leave(checkpoints.verify(checkpoint, runs, everything=everything))


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


def _leave(code: int) -> None:
    if code:
        raise typer.Exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and leave with its exit code: see `trainkit.errors`."""
    try:
        versions.check()
        code = app(arguments, standalone_mode=False)
    except BaseException as error:
        if os.environ.get("TRAINKIT_DEBUG") and not isinstance(error, SystemExit):
            raise
        code, line = _said(error)
        if line and (code == FAILED or os.environ.get("RANK", "0") == "0"):  # what all ranks find wrong is said once
            print(f"trainkit: {line}", file=sys.stderr)
    sys.exit(code or DONE)


def _said(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the line that a person reads."""
    from click import ClickException, exceptions

    if isinstance(error, ClickException):
        return MISTAKE, " ".join(error.format_message().split())
    if isinstance(error, KeyboardInterrupt | exceptions.Abort):
        return 130, "left at once: what was saved last is kept"
    if isinstance(error, SystemExit):
        return int(error.code or 0), ""
    code = getattr(error, "exit_code", FAILED)
    text = " ".join(str(error).split()) or type(error).__name__
    return code, text if code != FAILED else f"{type(error).__name__}: {text} (--debug shows where)"
