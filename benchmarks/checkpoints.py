"""What saving and resuming cost: `gpt2` (124M parameters) with AdamW's state, 1.5 GB.

    python benchmarks/checkpoints.py [--rounds 5] [--folder DISK] [--model gpt2] [--json FILE]

Every round measures all of these in turn, and the table holds medians:
- a save that training waits for, and how long training waits for one in the background;
- one copy of the state in host memory, which is the least that a background save can cost;
- `dd conv=fsync` of as many bytes to the same disk, and the same bytes read back, which is the least that a verified
  save can cost;
- a resume: verifying and loading in one pass, from the page cache and from the disk.

With `--every N` instead: how much longer N steps take with one save behind them than without, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import random_shards
import torch
from peers import VOCAB

from trainkit import build
from trainkit import run as runs
from trainkit.checkpoint import Checkpointer
from trainkit.learner import Learner

FACTS = {"metric": None, "epoch_end": False, "epoch": 0.0, "val_loss": None, "seconds": 0.0}


def learner(model: str, data: Path) -> Learner:
    overrides = [f"model={model}", f"model.vocab={VOCAB}", "data=shards", f"data.path={data}", "data.length=64"]
    run = runs.composed([*overrides, "data.batch=1"])
    it = build.learner(run, run.data.open(), build.ranks(run))
    it.train_step()
    return it


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def forget(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def dd(folder: Path, size: int) -> dict[str, float]:
    file = folder / "dd"
    count = size >> 20
    write = ["dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={count}", "conv=fsync", "status=none"]
    found = {"dd conv=fsync": timed(lambda: subprocess.run(write, check=True))}
    forget(folder)
    read = ["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"]
    found["dd read back"] = timed(lambda: subprocess.run(read, check=True))
    file.unlink()
    return found


def copy(it: Learner, copies: dict[str, torch.Tensor]) -> None:
    for key, tensor in it.tensors().items():
        copies[key].copy_(tensor)


def one_round(it: Learner, saver: dict[str, Checkpointer], folder: Path, size: int, step: int) -> dict[str, float]:
    found = dd(folder, size)

    for name, checkpointer in saver.items():
        copies = {key: tensor.detach().clone() for key, tensor in it.tensors().items()}
        found["one host copy"] = timed(partial(copy, it, copies))
        del copies
        checkpointer.save(step, it.tensors(), {"learner": it.state()}, {}, facts=FACTS)
        checkpointer.wait()
        (outcome,) = checkpointer.finished()
        assert outcome.error is None, outcome.error
        found[f"{name} save"] = outcome.save_s
        found[f"{name} save: training waits"] = outcome.stall_s
    latest = saver["synchronous"]
    for name in ("page cache", "disk"):
        if name == "disk":
            forget(latest.folder)
        found[f"resume from the {name}"] = timed(lambda: latest.load_latest(it.places))
    return found


def overhead(it: Learner, checkpointer: Checkpointer, every: int, rounds: int) -> None:
    """Print what a save behind `every` steps adds to them, the wait for its end at theirs included."""

    def steps(step: int | None) -> None:
        for number in range(every):
            float(it.train_step()["loss"])
            if number == 0 and step is not None:
                checkpointer.save(step, it.tensors(), {"learner": it.state()}, {}, facts=FACTS)
        checkpointer.wait()
        assert all(outcome.error is None for outcome in checkpointer.finished())

    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for step in range(1, rounds + 2):
        seconds["without"].append(timed(lambda: steps(None)))
        seconds["with"].append(timed(partial(steps, step)))
    added = [b - a for a, b in zip(seconds["without"], seconds["with"], strict=True)][1:]
    without = statistics.median(seconds["without"][1:])
    print(f"{every} steps take {without:.2f} s; a save behind them adds {statistics.median(added):.2f} s (median)")
    print("round by round: " + ", ".join(f"{more:+.2f}" for more in added))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--every", type=int, help="measure the overhead of a save each so many steps")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        Path(place, "data").mkdir()
        random_shards.write(Path(place, "data"), VOCAB, 100_000)
        it = learner(arguments.model, Path(place, "data"))
        size = sum(tensor.nbytes for tensor in it.tensors().values())
        saver = {
            name: runs.composed([f"checkpoint.asynchronous={name == 'asynchronous'}"]).checkpoint.build(
                Path(place, name), higher_is_better=False, versions={}
            )
            for name in ("synchronous", "asynchronous")
        }
        for checkpointer in saver.values():
            checkpointer.preflight(size)
        if arguments.every:
            return overhead(it, saver["asynchronous"], arguments.every, arguments.rounds)
        rounds = [one_round(it, saver, Path(place), size, step) for step in range(1, arguments.rounds + 2)][1:]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(f"{size / 1e9:.2f} GB of state, {torch.get_num_threads()} threads, median of {arguments.rounds} rounds\n")
    print("| | seconds | GB/s |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.3f} | {size / 1e9 / seconds:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "rounds": rounds, "medians": medians}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
