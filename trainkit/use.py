"""Using a checkpoint: the verbs `evaluate` and `generate`."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from trainkit import build, embed, hardware
from trainkit import run as runs
from trainkit.checkpoint import BadCheckpoint, Loaded, find, load
from trainkit.data import tokenizers
from trainkit.errors import DamagedError, UserError, nearest
from trainkit.launch import policy
from trainkit.learner import load_model
from trainkit.models.quantized import Format
from trainkit.models.quantized import quantize as in_format
from trainkit.progress import bytes_bar
from trainkit.run import Run
from trainkit.sampling import stream
from trainkit.units import human_bytes


def evaluate(which: str, overrides: list[str], root: Path, *, quantize: str | None, as_json: bool) -> None:
    """Print what the task measures on the validation split, of the checkpoint's own data or of `data=...`."""
    loaded, own = opened(which, root)
    refuse_format(quantize, own)
    if own.task.takes == "pairs":
        embed.report(loaded, own, overrides, quantize=quantize, as_json=as_json)
        return
    run = runs.saved(own.yaml(), overrides, free=("data",))
    run = replace(run, precision=run.precision.to_use(hardware.choose(run.parallel.device)))
    build.check(run)
    with bytes_bar() as report:
        corpus = run.data.open(report)
    carried = tokenizers.load(loaded.files.get("tokenizer.json", b""))
    if corpus.tokenizer.identity != carried.identity:
        raise UserError(
            f"the checkpoint was trained with the tokenizer {carried.name} and this data has {corpus.tokenizer.name}: "
            f"give the data the checkpoint's tokenizer"
        )
    ranks = build.ranks(run)
    learner = build.learner(run, corpus, ranks)
    load_model(learner.model, loaded.tensors)
    held = quantized(learner.model, quantize)
    try:
        found = run.task.evaluate(
            learner.model, learner.loader.validation(run.evaluation.batches), ranks=ranks, stop=lambda: False
        )
        assert found is not None  # nothing asks it to stop
    finally:
        learner.loader.close()
    if as_json:
        print(json.dumps({"run": own.name, "step": loaded.step, "path": str(loaded.path), **held, **found}))
    else:
        print(f"{own.name} step {loaded.step} on {corpus.validation_tokens:,} validation tokens of {corpus.name}")
        if quantize:
            print(f"  {'weights':15} {human_bytes(held['weight_bytes'])}, blocks in {quantize}")
        for name, value in found.items():
            print(f"  {name.removeprefix('val_').replace('_', ' '):15} {value:.4f}")


def generate(
    which: str,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
    quantize: str | None,
    root: Path,
) -> None:
    """Write the prompt and what the model goes on with to stdout, as it comes."""
    loaded, run = opened(which, root)
    refuse_format(quantize, run)
    if not run.task.writes:
        raise UserError(f"{run.name} has learned task={run.task.kind}, which writes no text")
    tokenizer = tokenizers.load(loaded.files.get("tokenizer.json", b""))
    place = hardware.choose(device)
    model = run.task.build(run.model.build()).to(place)
    load_model(model, loaded.tensors)
    model = run.precision.to_use(place).apply(model, place).eval()
    quantized(model, quantize)
    written = stream(
        model,
        tokenizer,
        prompt,
        tokens=tokens,
        context=run.model.context,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for text in itertools.chain([prompt], written):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def opened(which: str, root: Path) -> tuple[Loaded, Run]:
    """The checkpoint that `which` names, and the run that it carries."""
    path = find.resolve(which, root, policy)
    try:
        loaded = load(path)
    except BadCheckpoint as error:
        raise DamagedError(f"{path} is not good: {error}; `trainkit list-checkpoints` shows which are") from error
    run = runs.saved(loaded.files.get(runs.FILE, b""))
    held = sum(t.numel() * (2 if t.dtype == torch.uint8 else 1) for t in loaded.tensors.values())  # 4 bits are in bytes
    if run.model.parameters() > held:
        raise UserError(f"{path} is not of the model that its {runs.FILE} describes: it holds fewer parameters")
    return loaded, run


def refuse_format(form: str | None, run: Run) -> None:
    """Raise UserError when the blocks' weights cannot be held in `form`."""
    if form is not None and form not in (known := get_args(Format)):
        raise UserError(f"--quantize {form} is not a format{nearest(form, known)}")
    if form is not None and run.model.adapter is not None:
        raise UserError(
            f"--quantize is of one model, and {run.name} has an adapter: trainkit checkpoint merge {run.name}"
        )


def quantized(model: torch.nn.Module, form: Any) -> dict[str, int]:
    """Hold the blocks' weights in `form`, if one is given; the bytes of all weights."""
    if form is not None:
        in_format(model, form)
    return {"weight_bytes": sum(p.nbytes for p in model.parameters())}
