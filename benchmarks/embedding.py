"""Contrastive fine-tuning of the same encoder on the same pairs by trainkit and by sentence-transformers' trainer.

    python benchmarks/embedding.py --model FOLDER --pairs PAIRS.tsv [--rounds 6] [--steps 6] [--json FILE]

FOLDER is a model of sentence-transformers, PAIRS.tsv two texts a line. InfoNCE at temperature 0.05 from anchor to positive, 64
rows a step of at most 64 tokens, AdamW (fused), gradients clipped at 1, no dropout. Both learn in one process, in turns of a
few steps, and the figure is the mean step of all turns but the first: steps differ, as rows' lengths do. `--memory` measures
instead what torch's allocator handed out at most in a step of 256 rows of which 32 go through the model at once (GradCache),
in this process too.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainkit import build, imports
from trainkit import run as runs
from trainkit.profile.allocations import Allocations
from trainkit.speed import keep_freed

ROWS, LENGTH, LARGE, SMALL = 64, 64, 256, 32
Turn = Callable[[int], list[float]]


def ours(model: str, pairs: Path, precision: str, batch: int, microbatch: int | None) -> Any:
    """A learner that has the folder's weights."""
    words = [
        "task=embedding",
        "model=hf",
        f"model.name={model}",
        "data=pairs",
        f"data.path={pairs}",
        "data.columns=['0','1']",
    ]
    words += [f"data.batch={batch}", f"data.length={LENGTH}", "data.validation=0", f"precision={precision}", "name=b"]
    words += ["task.symmetric=false", "schedule=constant", "optimizer.lr=2e-5", "steps=100000"]
    words += [f"memory.microbatch={microbatch or 'null'}"]
    run = runs.composed(words)
    it = build.learner(run, run.data.open(), build.ranks(run))
    imports.read_into(it.model, Path(model))
    return it


def theirs(model: str, pairs: Path, precision: str, batch: int, microbatch: int | None) -> Any:
    """A function that trains so many steps, and the trainer's model."""
    import datasets
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    encoder = st.SentenceTransformer(model, device="cpu")
    encoder.max_seq_length = LENGTH
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = [line.split("\t") for line in pairs.read_text().splitlines()]
    data = datasets.Dataset.from_dict({"anchor": [r[0] for r in rows], "positive": [r[1] for r in rows]})
    loss: Any = losses.MultipleNegativesRankingLoss(encoder, scale=20.0)
    if microbatch:
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, scale=20.0, mini_batch_size=microbatch)
    return encoder, data, loss, precision, batch


def trained(parts: Any, steps: int, seen: list[float], seed: int = 0) -> Any:
    """Let their trainer do so many steps, and put the time of each step's end into `seen`."""
    import sentence_transformers as st
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(time.perf_counter())

    encoder, data, loss, precision, batch = parts
    with tempfile.TemporaryDirectory() as folder:
        how = st.SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            seed=seed,  # of the data's order
            per_device_train_batch_size=batch,
            learning_rate=2e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_steps=10**6,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = st.SentenceTransformerTrainer(
            model=encoder, args=how, train_dataset=data, loss=loss, callbacks=[Clock()]
        )
        trainer.train()
    return trainer


def in_turns(turns: dict[str, Turn], rounds: int, steps: int) -> dict[str, float]:
    """The mean seconds of a step of each, without the first round."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, turn in turns.items():
            found[name] += turn(steps) if number else turn(steps)[:0]
    return {name: statistics.fmean(seconds) for name, seconds in found.items()}


def speed(model: str, pairs: Path, precision: str, rounds: int, steps: int) -> dict[str, float]:
    it, parts = ours(model, pairs, precision, ROWS, None), theirs(model, pairs, precision, ROWS, None)

    seeds = itertools.count()

    def us(count: int) -> list[float]:
        ends = [time.perf_counter()]
        for _ in range(count):
            float(it.train_step()["loss"])
            ends.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(ends)]

    def them(count: int) -> list[float]:
        ends: list[float] = []
        trained(parts, count + 1, ends, next(seeds))  # the first begins when the trainer has been made
        return [b - a for a, b in itertools.pairwise(ends)]

    return in_turns({"trainkit": us, "sentence-transformers": them}, rounds, steps)


def memory(model: str, pairs: Path) -> dict[str, int]:
    it = ours(model, pairs, "fp32", LARGE, SMALL)
    it.train_step()
    with Allocations(it.model, it.optimizer) as us:
        it.train_step()
    del it
    parts = theirs(model, pairs, "fp32", LARGE, SMALL)
    with Allocations(parts[0]) as them:
        trained(parts, 2, [])  # the second has the optimizer's states
    return {"trainkit": us.peak, "sentence-transformers": them.peak}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed()  # for both: they share a process
    found: dict[str, Any] = {}
    if given.memory:
        found = memory(given.model, given.pairs)
        for name, size in found.items():
            print(f"{name:24} {size / 1e6:8.1f} MB at most")
    else:
        for precision in given.precisions:
            found[precision] = speed(given.model, given.pairs, precision, given.rounds, given.steps)
            for name, seconds in found[precision].items():
                print(f"{precision} {name:24} {1 / seconds:6.2f} steps/s, {ROWS / seconds:7.1f} pairs/s", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
