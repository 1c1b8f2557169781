"""What sums that are the same on any number of ranks cost: a step with `deterministic=elastic` beside one without.

    python benchmarks/exact_sums.py [--rounds 5]

6 layers of width 384, vocabulary 50,304, rows of 256 tokens, fp32, AdamW; two learners take turns, a step each, with 8 and
with 32 rows; medians. Microbatches of one row, the other way to the memory that elastic takes, stand beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import random_shards
from peers import CONTEXT, HEADS, LAYERS, VOCAB, WIDTH

from trainkit import build
from trainkit import run as runs
from trainkit.learner import Learner

WAYS = {
    "layout": [],
    "layout, one row at a time": ["memory.microbatch=1"],
    "elastic": ["deterministic=elastic"],
}


def learner(data: Path, rows: int, how: list[str]) -> Learner:
    words = f"vocab={VOCAB} width={WIDTH} depth={LAYERS} context={CONTEXT} attention.heads={HEADS}"
    overrides = [*(f"model.{word}" for word in words.split()), "data=shards", f"data.path={data}"]
    run = runs.composed([*overrides, f"data.length={CONTEXT}", f"data.batch={rows}", *how])
    return build.learner(run, run.data.open(), build.ranks(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| rows a step | " + " | ".join(f"{way}, s" for way in WAYS) + " | elastic / layout |")
    print("|---|" + "---|" * (len(WAYS) + 1))
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data")
        data.mkdir()
        random_shards.write(data, VOCAB, 400_000)
        for rows in (8, 32):
            learners = {way: learner(data, rows, how) for way, how in WAYS.items()}
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                for way, it in learners.items():
                    begin = time.perf_counter()
                    it.train_step()
                    if number:
                        seconds[way].append(time.perf_counter() - begin)
            medians = [statistics.median(seconds[way]) for way in WAYS]
            print(f"| {rows} | " + " | ".join(f"{s:.2f}" for s in medians) + f" | {medians[-1] / medians[0]:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
