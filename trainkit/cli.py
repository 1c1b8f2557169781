"""trainkit VERB [OVERRIDES]. A verb is a function; heavy imports wait until one is called."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainkit import __version__, logs, versions
from trainkit.benchmark import command as benchmark
from trainkit.choices import choices
from trainkit.cli_checkpoint import looking_after
from trainkit.cli_options import RUNS, ConfigDir, Json, Quantize, Runs, Words, complete, leave
from trainkit.errors import DONE, FAILED, MISTAKE, LostError
from trainkit.plan import command as plan_verb

app = typer.Typer(
    name="trainkit",
    help="Train, resume and look after language and embedding models on what you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.add_typer(looking_after, name="checkpoint")
benchmark.register(app, complete)
plan_verb.add_to(app, Words, ConfigDir)


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
    from trainkit import signals, torchrun

    signals.leave_at_once()
    ranks, words = torchrun.asked(overrides or [])
    from trainkit import launch, run

    it = run.composed(words, config_dir)
    if ranks:
        from trainkit import agent

        leave(agent.start(ranks, it, runs / it.name, torchrun.command("train", words, runs, config_dir)))
    else:
        leave(launch.train(it, runs))


@app.command()
def resume(
    which: Annotated[str, typer.Argument(metavar="[latest|best|RUN|PATH|URL]")] = "latest",
    overrides: Words = None,
    runs: Runs = RUNS,
    config_dir: ConfigDir = None,
) -> None:
    """Go on from a run's folder alone. How it is done may change; what is learned may not."""
    from trainkit import signals, torchrun

    signals.leave_at_once()
    if "=" in which:
        which, overrides = "latest", [which, *(overrides or [])]
    ranks, words = torchrun.asked(overrides or [])
    from trainkit import launch

    it, root, start = launch.resumed(which, words, runs, config_dir)
    if ranks:
        from trainkit import agent

        again = str(start or root / it.name)
        leave(agent.start(ranks, it, root / it.name, torchrun.command("resume", [again, *words], runs, config_dir)))
    else:
        leave(launch.train(it, root, start=start))


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
    quantize: Quantize = None,
    json_: Json = False,
    runs: Runs = RUNS,
) -> None:
    """What the task measures, on the checkpoint's own validation split or on another data=..."""
    from trainkit import use

    use.evaluate(checkpoint, overrides or [], runs, quantize=quantize, as_json=json_)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    prompt: Annotated[str | None, typer.Option(help="The text to go on from; a new line by default.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts, one a line, or - for stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: the prompt, or each line of stdin, is answered.")] = False,
    system: Annotated[str | None, typer.Option(help="What a chat begins with.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from this much probability.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quantize: Quantize = None,
    runs: Runs = RUNS,
) -> None:
    """Write text with a checkpoint, or with somebody's model: hf:NAME."""
    from trainkit import say

    how = {
        "tokens": tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "until": stop or [],
    }
    where = {"prompts": prompts, "talk": chat, "system": system, "rows": rows, "device": device, "quantize": quantize}
    say.generate(checkpoint, prompt, runs, **where, **how)  # type: ignore[arg-type]  # each by its name


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, as PEFT reads it.")] = False,
    gguf: Annotated[str | None, typer.Option(help="Also a GGUF file: fp32, fp16, bf16 or q8_0.")] = None,
    push: Annotated[str | None, typer.Option(help="Put the folder on the Hugging Face hub, as OWNER/NAME.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Where only its owner sees it.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Write a folder that transformers opens: config, safetensors, tokenizer, model card."""
    from trainkit.export import export as write

    write(checkpoint, out, runs, dtype=dtype, adapter=adapter, gguf=gguf, push=push, private=private)


@app.command()
def embed(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    prompt: Annotated[str, typer.Option(help="What goes before every line, if the model learned with one.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Lines that go through the model at once.")] = 64,
    width: Annotated[int | None, typer.Option(min=1, help="Keep the first numbers of a vector only.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quantize: Quantize = None,
    runs: Runs = RUNS,
) -> None:
    """A vector for every line: trainkit embed CHECKPOINT < lines > vectors.npy"""
    from trainkit import embed as verb

    verb.embed(checkpoint, prompt, rows, width, device, quantize, runs)


@app.command()
def doctor(json_: Json = False, runs: Runs = RUNS) -> None:
    """What this machine has and what trainkit can use of it."""
    from trainkit import show

    show.doctor(runs, as_json=json_)


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and leave with its exit code: see `trainkit.errors`."""
    try:
        versions.check()
        logs.hush()
        code = app(arguments, standalone_mode=False)
    except BaseException as error:
        if os.environ.get("TRAINKIT_DEBUG") and not isinstance(error, SystemExit):
            raise
        code, line = _said(error)
        if line and (code == FAILED or os.environ.get("RANK", "0") == "0"):  # what all ranks find wrong is said once
            if code == FAILED:
                logs.trace(error)
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
    if code != FAILED or isinstance(error, LostError):
        return code, text
    return code, f"{type(error).__name__}: {text} (--debug shows where)"
