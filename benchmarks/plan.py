"""How near `trainkit plan` comes to what torch's allocator hands out: python -m benchmarks.plan [--out docs/benchmarks/plan.md]

Every cell is a run in a process of its own: two updates, an evaluation with a sample, a save behind training with another
update and evaluation, a resume. All allocations are those that torch.profiler reports. Memory does not depend on how busy
the machine is.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from trainkit import build
from trainkit import run as runs
from trainkit.plan.cards import Card
from trainkit.plan.planned import Setting, plan
from trainkit.profile.allocations import Allocations
from trainkit.run import Run
from trainkit.tasks.generate import generate

PHASES = ("training", "evaluation", "saving", "resuming")
TINY, CHAR, M50, GPT2 = "model=tiny", "model=char-small", "model=M50", "model=gpt2"
CHECKPOINT, OFFLOAD, BOTH = "memory=checkpoint", "memory=offload_activations", "memory=checkpoint+offload_activations"
ONE, START = "one-document", "start_from=base"  # of which nothing is read here
CPU = torch.device("cpu")
NO_SPEED = Card("cpu", 24, 1, 1, 1, 1, 1, 1, 1, 1, cuda=False)
CELLS = [
    [TINY, "data.batch=16"],
    [TINY, "data.batch=16", "precision=bf16", ONE],
    [TINY, "data.batch=16", "precision=fp64", "memory.microbatch=8"],
    [TINY, "data.batch=32", CHECKPOINT, "optimizer=muon"],
    [TINY, "data.batch=12", "deterministic=elastic", "optimizer=sgd"],
    [TINY, "data.batch=8", "model.dropout=0.1", "precision=fp16", "data.length=64"],
    [CHAR, "data.batch=8"],
    [CHAR, "data.batch=8", ONE],
    [CHAR, "data.batch=8", "precision=bf16"],
    [CHAR, "data.batch=8", "memory.microbatch=2"],
    [CHAR, "data.batch=8", CHECKPOINT, "precision=bf16"],
    [CHAR, "data.batch=8", CHECKPOINT, "memory.checkpoint.every=2"],
    [CHAR, "data.batch=8", OFFLOAD, "memory.microbatch=4"],
    [CHAR, "data.batch=8", BOTH, "precision=bf16", "memory.microbatch=4"],
    [CHAR, "data.batch=6", "model.dropout=0.1", "memory.microbatch=4"],
    [CHAR, "data.batch=8", "optimizer=muon", "precision=bf16"],
    [CHAR, "data.batch=8", "optimizer=sgd", CHECKPOINT],
    [CHAR, "data.batch=8", "checkpoint.asynchronous=false"],
    [M50, "data.batch=4"],
    [M50, "data.batch=4", "precision=bf16"],
    [M50, "data.batch=4", CHECKPOINT],
    [M50, "data.batch=4", CHECKPOINT, "precision=bf16", "memory.microbatch=1"],
    [M50, "data.batch=2", "data.length=1024", "precision=bf16", ONE],
    [M50, "data.batch=2", "data.length=1024", CHECKPOINT, "optimizer=muon"],
    [M50, "data.batch=4", "model.attention.window=64", ONE],
    [GPT2, "data.batch=2"],
    [GPT2, "data.batch=4", "precision=bf16", "memory.microbatch=2"],
    [GPT2, "data.batch=4", CHECKPOINT, ONE],
    [GPT2, "data.batch=4", CHECKPOINT, "precision=bf16"],
    [GPT2, "data.batch=1", "data.length=1024", BOTH],
    [CHAR, "data.batch=8", "memory=8bit"],
    [CHAR, "data.batch=8", "memory=4bit+checkpoint", "precision=bf16"],
    [CHAR, "data.batch=8", "memory=fp8", "memory.microbatch=2"],
    [CHAR, "data.batch=8", "memory=offload_optimizer"],
    [CHAR, "data.batch=8", "memory=8bit+offload_optimizer+checkpoint"],
    [CHAR, "data.batch=8", "memory=step_in_backward", "clip=0"],
    [CHAR, "data.batch=8", "memory=8bit+checkpoint+step_in_backward", "clip=0", "precision=bf16"],
    [CHAR, "data.batch=8", "memory=stream"],
    [CHAR, "data.batch=8", "memory=checkpoint+stream", "precision=bf16", "memory.microbatch=2"],
    [CHAR, "data.batch=8", "memory=selective"],
    [CHAR, "data.batch=8", "precision=bf16_pure"],
    [CHAR, "data.batch=8", "precision=bf16_master", CHECKPOINT],
    [CHAR, "data.batch=8", "model.adapter=lora", START],
    [CHAR, "data.batch=8", "model.adapter=qlora", START, "precision=bf16", CHECKPOINT],
    [CHAR, "data.batch=8", "model.adapter=dora", START],
]
SMALLER = ["data=text", "data.path=corpus", "data.length=128", "data.validation=0.3", "evaluation.sample_tokens=16"]


def composed(cell: list[str]) -> Run:
    """A cell's run."""
    return runs.composed([*SMALLER, "schedule.warmup=2", "name=cell", *(w for w in cell if w != ONE)])


def write_corpus(folder: Path, one_document: bool) -> None:
    """Text in documents of some dozen bytes, or two that are longer than what is read of them."""
    folder.mkdir(exist_ok=True)
    line = "the quick brown fox jumps over the lazy dog, again. "
    for i in range(2 if one_document else 4000):
        (folder / f"{i}.txt").write_text(f"{i} " + line * (4000 if one_document else 1 + i % 2))


def measured(cell: list[str]) -> dict[str, int]:
    """The most bytes that were allocated at once in each phase of a real run in this folder."""
    torch.set_num_threads(1)
    gc.collect()  # what others left is theirs
    write_corpus(Path("corpus"), ONE in cell)
    run = composed(cell)
    corpus, folder = run.data.open(), Path("run")
    with Allocations(torch.nn.Module(), device=CPU) as first:
        ranks = build.ranks(run)
        it = build.learner(run, corpus, ranks)
        checkpointer = run.checkpoint.build(folder, higher_is_better=False, versions={})
        checkpointer.preflight(1)
        with first.phase("training"):
            it.train_step(), it.train_step()
        with first.phase("evaluation"):
            _evaluate(run, it)
        with first.phase("saving"):
            checkpointer.save(it.step, it.tensors(), {"learner": it.state()}, {}, facts=_FACTS)
            if run.checkpoint.asynchronous:  # then training goes on beside it
                it.train_step()
                _evaluate(run, it)
        checkpointer.wait()
        for outcome in checkpointer.finished():
            assert outcome.error is None, outcome.error
    del it, checkpointer
    with Allocations(torch.nn.Module(), device=CPU) as second:
        it = build.learner(run, corpus, ranks)
        checkpointer = run.checkpoint.build(folder, higher_is_better=False, versions={})
        with second.phase("resuming"):
            found = checkpointer.load_latest(it.places)
            assert found is not None
            it.load(found.tensors, found.state["learner"])
    ranks.leave()
    phases = first.by_phase | {"resuming": second.by_phase["resuming"]}
    return {name: phases[name].peak for name in PHASES}


_FACTS = {"metric": None, "val_loss": None, "epoch": 0.0, "epoch_end": False, "tokens": 0, "seconds": 0.0}


def _evaluate(run: Run, it: Any) -> None:
    batches = it.loader.validation(2)
    assert it.evaluate(batches, stop=lambda: False) is not None
    written = generate(it.model, [10], tokens=run.evaluation.sample_tokens, context=run.model.context, seed=0)
    assert len(list(written)) == run.evaluation.sample_tokens


def predicted(cell: list[str], *, whole: bool = False) -> dict[str, int]:
    """What the plan says. It needs no data, and no speed of this machine."""
    torch.set_num_threads(1)
    return plan(composed(cell), Setting(NO_SPEED, documents=ONE not in cell), whole=whole).peaks


def _in_process(number: int) -> list[dict[str, int]]:
    """A cell's prediction and measurement."""
    command = [sys.executable, "-m", "benchmarks.plan", "--cell", str(number)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    both: list[dict[str, int]] = json.loads(out.splitlines()[-1])
    return both


def compared(said: dict[str, int], found: dict[str, int]) -> tuple[list[float], str]:
    """How far off each phase's prediction is, and a table's row of them; of a phase that is not planned nothing."""
    off = {name: said[name] / found[name] - 1 for name in found if said[name]}
    both = (f"{said[n] / 1e6:.1f} / {found[n] / 1e6:.1f} ({off[n]:+.2%})" if n in off else "" for n in found)
    return list(off.values()), " | ".join(both)


def report(
    rows: list[str], errors: list[float], phases: tuple[str, ...], page: Path | None, mark: str, first: str = ""
) -> None:
    """Say how near it came, and put the table, whose first column is named so, between a page's marks."""
    worst, mean = max(map(abs, errors)), statistics.mean(map(abs, errors))
    summary = f"{len(errors)} peaks of {len(rows)} runs: worst error {worst:.2%}, mean {mean:.2%}"
    print(summary)
    if page:
        head = f"| {first} | overrides | " + " | ".join(phases) + " |\n|---|---|" + "---|" * len(phases)
        before, _, rest = page.read_text().partition(f"<!-- {mark} -->")
        _, _, after = rest.partition(f"<!-- end {mark} -->")
        table = "\n".join([summary, "", head, *rows])
        page.write_text(f"{before}<!-- {mark} -->\n{table}\n<!-- end {mark} -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write a page with the table")
    parser.add_argument("--cell", type=int, help="only this one, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; memory does not mind")
    given = parser.parse_args()
    if given.cell is not None:
        cell = CELLS[given.cell]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            os.environ["TRAINKIT_CACHE"] = folder
            print(json.dumps([predicted(cell), measured(cell)]))
        return
    rows, errors = [], []
    pool = ThreadPoolExecutor(given.jobs)
    for number, (said, found) in enumerate(pool.map(_in_process, range(len(CELLS)))):
        off, row = compared(said, found)
        errors += off
        rows.append(f"| {number + 1} | `{' '.join(CELLS[number])}` | {row} |")
        print(rows[-1], flush=True)
    report(rows, errors, PHASES, given.out, "grid")


if __name__ == "__main__":
    main()
