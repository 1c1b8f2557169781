"""Short runs in processes of their own, for the scripts that end them in every way. They are forked from one that has torch
already, so that a start is cheap."""

import json
import os
import random
from pathlib import Path

from tests.forked import Process

WORDS = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"
SMALL = [
    *("data=text", "data.path=corpus.txt", "data.length=32", "data.batch=4", "data.validation=0.2"),
    *("model.width=16", "model.depth=2", "model.attention.heads=2", "model.context=64", "model.dropout=0.1"),
    *("schedule.warmup=2", "tracking=jsonl", "tracking.every=1", "evaluation=end", "evaluation.sample_tokens=0"),
]


def write_corpus(file: Path, documents: int, draw: random.Random) -> None:
    """Documents of forty words."""
    file.write_text("\n\n".join(" ".join(draw.choices(WORDS.split(), k=40)) for _ in range(documents)))


def train(overrides: list[str], folder: str, said: str = os.devnull) -> None:
    """In a child: train in `folder` and leave with the exit code. What it prints goes to the file `said`."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    os.setpgid(0, 0)  # so that a kill takes the workers along, as the end of a machine does
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    if said != os.devnull:
        os.dup2(out, 2)
    from trainkit import launch, signals
    from trainkit import run as runs

    signals.leave_at_once()
    code = 1
    try:
        code = launch.train(runs.composed(overrides), Path("runs"))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", *([f"({error.__cause__!r})"] if error.__cause__ else []), flush=True)
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)


def begin(overrides: list[str], folder: str, said: str = os.devnull) -> Process:
    """Start a run in a process of its own group."""
    process = Process(target=train, args=(overrides, folder, said))
    process.start()
    return process


def end_of(folder: Path, name: str) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """The final tensors' bytes and the logged losses."""
    from trainkit.checkpoint import store

    tensors = store.load(store.folders(folder / "runs" / name / "checkpoints")[-1]).tensors
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    bits = {key: tensor.contiguous().flatten().numpy().tobytes() for key, tensor in tensors.items()}
    return bits, [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def difference(
    ours: tuple[dict[str, bytes], list[tuple[int, float]]], whole: tuple[dict[str, bytes], list[tuple[int, float]]]
) -> str | None:
    """What is not the same, in words."""
    tensors = [key for key in whole[0] if ours[0].get(key) != whole[0][key]]
    if tensors:
        return f"{len(tensors)} of {len(whole[0])} tensors, the first {tensors[0]}"
    if ours[1] != whole[1]:
        at = next((i for i, (a, b) in enumerate(zip(ours[1], whole[1])) if a != b), min(len(ours[1]), len(whole[1])))
        return f"metrics.jsonl has {len(ours[1])} lines instead of {len(whole[1])}; the first other one is {at}"
    return None
