"""Tokens a second of the loader at 32K tokens a row, next to what a training step of `gpt2` consumes on this machine.

    python benchmarks/loader.py [--workers 0 2]

The step is gpt2's own at context 256, one row, bfloat16, eager: what FACTS of such machines give as their fastest.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import random_shards

from trainkit import build
from trainkit import run as runs

VOCAB, TOKENS, LENGTH, BATCH = 50257, 20_000_000, 32768, 4


def loader_rate(data: Path, workers: int, steps: int = 60) -> float:
    """Tokens a second, after the first batches."""
    words = [f"data.path={data}", f"data.length={LENGTH}", f"data.batch={BATCH}", f"data.workers={workers}"]
    run = runs.composed(["data=shards", *words, "model=gpt2", f"model.context={LENGTH}", "steps=1000"])
    ranks = build.ranks(run)
    loader = run.data.build(run.data.open(), seed=0, ranks=ranks, device=ranks.device)
    for step in range(4):
        loader.at(step)
    begin = time.perf_counter()
    for step in range(4, steps):
        loader.at(step)
    seconds = time.perf_counter() - begin
    loader.close()
    return (steps - 4) * BATCH * LENGTH / seconds


def step_rate(data: Path, steps: int = 4) -> float:
    """Tokens a second of a training step."""
    words = ["data=shards", f"data.path={data}", "data.length=256", "data.batch=1", "model=gpt2", "precision=bf16"]
    run = runs.composed([*words, "steps=1000"])
    learner = build.learner(run, run.data.open(), build.ranks(run))
    learner.train_step()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        float(learner.train_step()["loss"])
        seconds.append(time.perf_counter() - begin)
    return 256 / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = random_shards.write(Path(name), VOCAB, TOKENS)
        consumed = step_rate(data)
        print(f"a step of gpt2 consumes {consumed:,.0f} tokens/s")
        for workers in arguments.workers:
            rate = statistics.median(loader_rate(data, workers) for _ in range(3))
            print(f"the loader with {workers} workers makes {rate:,.0f} tokens/s: {rate / consumed:,.0f} times as many")


if __name__ == "__main__":
    main()
