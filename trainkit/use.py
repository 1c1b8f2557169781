"""Using a checkpoint: the verb `evaluate`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from trainkit import build, embed, hardware, mteb_eval
from trainkit import run as runs
from trainkit import start as starts
from trainkit.data.tokenizers import LEARNED, TokenizerConfig
from trainkit.errors import UserError, nearest
from trainkit.learner import load_model
from trainkit.models.quantized import Format
from trainkit.models.quantized import quantize as in_format
from trainkit.opened import opened, tokenizer_of
from trainkit.progress import bytes_bar
from trainkit.run import Run
from trainkit.units import human_bytes


def evaluate(which: str, overrides: list[str], root: Path, *, quantize: str | None, as_json: bool) -> None:
    """Print what the task measures on the validation split, of the checkpoint's own data or of `data=...`; or with `eval=mteb`
    what that library does."""
    others = mteb_eval.asked(overrides)
    loaded, own = opened(which, root)
    refuse_format(quantize, own)
    if others:
        mteb_eval.evaluate(loaded, own, overrides, quantize=quantize, as_json=as_json)
        return
    if own.task.takes == "pairs":
        embed.report(loaded, own, overrides, quantize=quantize, as_json=as_json)
        return
    run = _with_its_tokenizer(runs.saved(own.yaml(), overrides, free=("data",)), own, overrides, loaded.path)
    run = replace(run, precision=run.precision.to_use(hardware.choose(run.parallel.device)))
    build.check(run)
    with bytes_bar() as report:
        corpus = run.data.open(report)
    carried = tokenizer_of(loaded)
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


def _with_its_tokenizer(run: Run, own: Run, overrides: list[str], checkpoint: Path) -> Run:
    """`run` on its data, which is read with the checkpoint's tokenizer unless a person names another one."""
    named = any(word.lstrip("+~").startswith("data.tokenizer") for word in overrides)
    data: Any = run.data
    if hasattr(data, "tokenizer") and data != own.data and not named:
        tokenizer = getattr(own.data, "tokenizer", None)
        if tokenizer is None or tokenizer.kind in LEARNED:  # it is what the checkpoint carries
            tokenizer = TokenizerConfig(kind="file", path=str(checkpoint / "tokenizer.json"))
        run = replace(run, data=replace(data, tokenizer=tokenizer))
    return starts.with_kept_tokenizer(run, [checkpoint])


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
