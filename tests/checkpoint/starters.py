"""Eight processes that start the same run at the same moment."""

import json
import os
import random
import signal
import time
from pathlib import Path

from tests.forked import Process
from tests.short_runs import SMALL
from trainkit.checkpoint import store
from trainkit.errors import MISTAKE, STOPPED

STARTERS = 8
PATIENCE_S = 120.0
LONG = [*SMALL, "steps=1000000", "checkpoint.every=5", "checkpoint.keep_best=0"]


def _start(words: list[str], folder: str, at: float, said: str) -> None:
    import torch

    from trainkit import cli

    torch.set_num_threads(1)
    os.chdir(folder)
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    while time.monotonic() < at:
        pass
    code = 1
    try:
        cli.main(["train", *words])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os._exit(code)


def one_round(folder: Path, name: str, draw: random.Random) -> None:
    """Eight start the run `name`: one has it and seven leave with 2 and one line. The one is killed, and eight start it
    again: one of them goes on from what was saved. It is asked to stop, and does. Raises AssertionError."""
    checkpoints = folder / "runs" / name / "checkpoints"
    before = -1
    for end in (signal.SIGKILL, signal.SIGTERM):
        at = time.monotonic() + 0.3 + draw.random() * 0.2
        said = [folder / f"said-{i}" for i in range(STARTERS)]
        for file in said:
            file.unlink(missing_ok=True)
        starters = [Process(target=_start, args=([*LONG, f"name={name}"], str(folder), at, str(file))) for file in said]
        for it in starters:
            it.start()
        patience = time.monotonic() + PATIENCE_S
        while sum(it.exitcode is None for it in starters) > 1 or newest(checkpoints) <= before:
            assert time.monotonic() < patience, [it.exitcode for it in starters]
            assert any(it.exitcode is None for it in starters), [it.exitcode for it in starters]
            time.sleep(0.02)
        (winner,) = (it for it in starters if it.exitcode is None)
        assert [it.exitcode for it in starters if it is not winner] == [MISTAKE] * (STARTERS - 1)
        for it, file in zip(starters, said):
            if it is not winner:
                (line,) = file.read_text().splitlines()
                assert line.startswith(f"trainkit: the run {name} is in use by"), line
        before = newest(checkpoints)
        assert winner.pid is not None
        os.kill(winner.pid, end)
        winner.join(PATIENCE_S)
        assert winner.exitcode == (STOPPED if end == signal.SIGTERM else -end)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))  # two writers would have doubled some


def newest(checkpoints: Path) -> int:
    found = store.folders(checkpoints)
    return store.step_of(found[-1].name) or 0 if found else -1
