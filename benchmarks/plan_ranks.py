"""How near `trainkit plan` comes to what torch's allocator hands out on each of several ranks that train together over gloo:
python -m benchmarks.plan_ranks [--out docs/benchmarks/plan.md]

As benchmarks/plan.py, two updates and an evaluation. Peaks are those of the rank that takes most.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.plan import CPU, NO_SPEED, SMALLER, compared, report, write_corpus
from benchmarks.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.parallel import Parallel, Ranks
from trainkit.plan.planned import Setting, plan
from trainkit.profile.allocations import Allocations
from trainkit.run import Run

PHASES = ("training", "evaluation")
CHAR, M50 = "model=char-small data.batch=8", "model=M50 data.batch=8"
CELLS = [
    (2, f"{CHAR} parallel=fsdp"),
    (4, f"{CHAR} parallel=fsdp"),
    (2, f"{CHAR} parallel=fsdp memory=checkpoint memory.microbatch=2"),
    (4, f"{CHAR} parallel=fsdp memory=checkpoint memory.microbatch=1"),
    (2, f"{CHAR} parallel=fsdp precision=bf16 memory=checkpoint"),
    (2, f"{M50} parallel=fsdp memory=checkpoint"),
    (4, f"{M50} parallel=fsdp memory=checkpoint"),
    (2, f"{CHAR} parallel=fsdp parallel.reshard=false"),
    (4, f"{CHAR} parallel=hsdp"),
    (2, f"{CHAR} parallel=ddp"),
    (4, f"{CHAR} parallel=ddp memory.microbatch=1"),
    (2, f"{CHAR} parallel=tp"),
    (4, f"{CHAR} parallel=fsdp parallel.tp=2"),
    (2, f"{CHAR} parallel=cp"),
    (2, f"{CHAR} parallel=pp memory.microbatch=2"),
    (2, f"{CHAR} parallel=pp memory.microbatch=1 parallel.schedule=gpipe memory=checkpoint"),
]


def composed(words: str) -> Run:
    """A cell's run."""
    return runs.composed([*SMALLER, "schedule.warmup=2", "name=cell", "parallel.device=cpu", *words.split()])


def measured(words: str, joined: Ranks) -> dict[str, int]:
    """The most bytes that were allocated at once on this rank in each phase."""
    gc.collect()  # what the cell before left
    run = composed(words)
    corpus = run.data.open()
    with Allocations(torch.nn.Module(), device=CPU) as seen:
        with seen.phase("building"):
            it = build.learner(run, corpus, run.parallel.lay_out(joined))
        seen.model, seen.optimizer = it.model, it.optimizer
        it.train_step(), it.train_step()  # in phases of their own: what gloo's threads drop last ends with a backward
        with seen.phase("evaluation"):
            assert it.evaluate(it.loader.validation(1), stop=lambda: False) is not None
    training = max(it.peak for name, it in seen.by_phase.items() if name not in ("building", "evaluation"))
    return {"training": training, "evaluation": seen.by_phase["evaluation"].peak}


def as_rank(cells: list[str]) -> list[dict[str, int]]:
    """Every cell's peaks on this rank."""
    torch.set_num_threads(1)
    joined = Parallel(kind="ddp", device="cpu").join(CPU)
    found = [measured(words, joined) for words in cells]
    joined.leave()
    return found


def predicted(ranks: int, words: str) -> dict[str, int]:
    """What the plan says of the rank that takes most. It needs no data, and no speed of this machine."""
    torch.set_num_threads(1)
    return plan(composed(f"{words} evaluation.sample_tokens=0"), Setting(NO_SPEED, ranks), whole=True).peaks


def in_processes(ranks: int, cells: list[str]) -> list[dict[str, int]]:
    """Of every cell the highest of the ranks' peaks."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "corpus"), one_document=False)
        said = in_ranks(
            ranks, "benchmarks.plan_ranks", ["--measure", json.dumps(cells)], {"TRAINKIT_CACHE": folder}, Path(folder)
        )
    found = [json.loads(text.splitlines()[-1]) for text in said]
    return [{name: max(one[name] for one in of) for name in PHASES} for of in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write a page with the table")
    parser.add_argument("--measure", help="as one rank: these cells, as JSON")
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(as_rank(json.loads(given.measure))))
        return
    rows: list[str] = []
    errors: list[float] = []
    for ranks in (2, 4):
        cells = [words for size, words in CELLS if size == ranks]
        for words, found in zip(cells, in_processes(ranks, cells), strict=True):
            said = predicted(ranks, words)
            off, row = compared(said, found)
            errors += off
            rows.append(f"| {ranks} | `{words}` | {row} |")
            print(rows[-1], flush=True)
    report(rows, errors, PHASES, given.out, "ranks", first="ranks")


if __name__ == "__main__":
    main()
