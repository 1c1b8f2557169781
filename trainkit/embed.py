"""Using an embedding model: the verb `embed`, and what `evaluate` says of one."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from trainkit import build, floors, hardware, use
from trainkit import run as runs
from trainkit.checkpoint import Loaded
from trainkit.data.pair_corpus import PairRows
from trainkit.data.pair_table import ends
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError
from trainkit.learner import load_model
from trainkit.opened import opened, tokenizer_of
from trainkit.progress import bytes_bar
from trainkit.run import Run


def embed(which: str, prompt: str, rows: int, width: int | None, device: str, quantize: str | None, root: Path) -> None:
    """Write the vectors (lines, width) of the lines of standard input to standard output, as a .npy of float32.

    Raises:
        UserError: the checkpoint is of another task, or standard output is a terminal.
    """
    if sys.stdout.isatty():
        raise UserError("vectors are no text: write them to a file, trainkit embed CHECKPOINT < lines > vectors.npy")
    loaded, run = opened(which, root)
    use.refuse_format(quantize, run)
    encoder = Encoder.of(loaded, run, device, quantize)
    lines = [prompt + line.rstrip("\n") for line in sys.stdin]
    np.save(sys.stdout.buffer, encoder.encode(lines, rows=rows, width=width), allow_pickle=False)


class Encoder:
    """A trained model and its tokenizer: texts in, vectors out."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, data: Any, device: torch.device) -> None:
        self._model, self._tokenizer, self._device = model.eval(), tokenizer, device
        self._length, self._ends = data.length, ends(tokenizer, data.specials)

    @classmethod
    def of(cls, loaded: Loaded, run: Run, device: str, quantize: str | None) -> "Encoder":
        """That of a checkpoint.

        Raises:
            UserError: it has learned another task.
        """
        if run.task.takes != "pairs":
            raise UserError(f"{run.name} has learned task={run.task.kind}, which makes no vectors: use task=embedding")
        tokenizer = tokenizer_of(loaded)
        place = hardware.choose(device)
        model = run.task.build(run.model.build()).to(place)
        load_model(model, loaded.tensors)
        model = run.precision.to_use(place).apply(model, place)
        use.quantized(model, quantize)
        return cls(model, tokenizer, run.data, place)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, rows: int = 64, width: int | None = None) -> NDArray[np.float32]:
        """The vectors (texts, K) of length 1, `rows` texts of similar length at a time; of the first `width` numbers
        only, which a Matryoshka loss makes meaningful.

        Raises:
            UserError: `width` is wider than the vectors.
        """
        ids = [self._ends.whole(one, self._length) for one in self._tokenizer.encode_all(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors: NDArray[np.float32] | None = None
        for begin in range(0, len(order), rows):
            some = order[begin : begin + rows]
            lengths = torch.tensor([len(ids[i]) for i in some])
            padded = torch.full((len(some), int(lengths.max())), self._ends.empty)
            for row, i in enumerate(some):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
            found = self._model(padded.to(self._device), lengths.to(self._device))
            if width is not None and width > found.shape[1]:
                raise UserError(f"--width {width} is wider than the vectors, which have {found.shape[1]} numbers")
            found = F.normalize(found[:, :width], dim=-1).float().cpu().numpy()
            vectors = np.empty((len(ids), found.shape[1]), dtype=np.float32) if vectors is None else vectors
            vectors[some] = found
        return np.empty((0, width or 0), dtype=np.float32) if vectors is None else vectors


PAIRS = ("pairs", "wordnet", "stsb")


def reading_alike(own: Run, overrides: list[str]) -> Run:
    """`own` on other data, whose texts are read as those that it has learned from: between the same specials, as long, and
    behind the same prompts, unless a person says otherwise."""
    assert isinstance(own.data, PairRows)  # a run of this task has no other
    given = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    same = [f"data.{key}={getattr(own.data, key)}" for key in ("specials", "length") if f"data.{key}" not in given]
    if given.get("data", "pairs") not in PAIRS:  # refused, in words about that
        same = []
    run = runs.saved(own.yaml(), [*overrides, *same], free=("data", "evaluation"))
    assert isinstance(run.data, PairRows)
    prompts = run.data.prompts if "data.prompts" in given else own.data.prompts
    return replace(run, data=replace(run.data, prompts=prompts))


def report(loaded: Loaded, own: Run, overrides: list[str], *, quantize: str | None, as_json: bool) -> None:
    """Print what the task measures on the held-out pairs of the checkpoint's own data or of `data=...`, read by the
    checkpoint's tokenizer, beside what a model that has learned nothing and common words reach."""
    run = reading_alike(own, overrides)
    run = replace(run, precision=run.precision.to_use(hardware.choose(run.parallel.device)))
    assert isinstance(run.data, PairRows)
    run.data.check()
    tokenizer = tokenizer_of(loaded)
    with bytes_bar() as progress:
        corpus = run.data.open(progress, tokenizer)
    ranks = build.ranks(run)
    learner = build.learner(run, corpus, ranks)
    try:
        floor = floors.untrained(learner, run.evaluation.batches)
        load_model(learner.model, loaded.tensors)
        held = use.quantized(learner.model, quantize)
        found = learner.evaluate(learner.loader.validation(run.evaluation.batches), lambda: False)
        assert found is not None  # nothing asks it to stop
    finally:
        learner.loader.close()
    overlap = floors.idf_overlap(corpus)
    if as_json:
        known = {"untrained": floor, "idf_overlap": overlap}
        print(json.dumps({"run": own.name, "step": loaded.step, "path": str(loaded.path), **held, **found, **known}))
        return
    print(f"{own.name} step {loaded.step} on {corpus.validation_tokens:,} validation tokens of {corpus.name}")
    print(f"  {'':15} {'':>9} {'untrained':>10} {'words':>8}")
    for name, value in found.items():
        words = f"{overlap:8.4f}" if name == "val_spearman" and overlap is not None else ""
        print(f"  {name.removeprefix('val_'):15} {value:9.4f} {floor[name]:10.4f} {words}")
