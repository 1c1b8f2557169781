"""A run that is killed at any moment and resumed ends with bitwise the weights of the run that was left alone."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.forked import Process
from trainkit.checkpoint import find, load
from trainkit.launch import policy

STEPS = 60
TIERS = {
    "tightest": ["checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_best=0"],
    "usual": ["checkpoint.every=5", "checkpoint.keep=2", "checkpoint.keep_best=1", "evaluation.every=7"],
    "archive": ["checkpoint.every=4", "checkpoint.keep=3", "checkpoint.keep_best=3", "evaluation.every=6"],
    "epochs": ["checkpoint.every=9", "checkpoint.keep_epochs=true", "data.workers=1"],
}


def train(overrides: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.setpgid(0, 0)  # so that a kill takes the workers along, as the end of a machine does
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    from trainkit import launch
    from trainkit import run as runs

    os._exit(launch.train(runs.composed(overrides), Path("runs")))


def last(name: str) -> dict[str, torch.Tensor]:
    return load(find.resolve(name, Path("runs"), policy)).tensors


def killed_eight_times(overrides: list[str], name: str, place: Path, seconds: float, draw: random.Random) -> None:
    """Start a run again and again, eight times ended by SIGKILL, and then let it come to its end."""
    kills = 0
    while True:
        run = Process(target=train, args=([*overrides, f"name={name}"], str(place)))
        run.start()
        run.join(draw.uniform(0.1, 0.6) * seconds if kills < 8 else None)
        if run.exitcode is None:
            os.killpg(run.pid, signal.SIGKILL)  # type: ignore[arg-type]  # it has started
            run.join()
            kills += 1
            continue
        assert run.exitcode == 0, f"after {kills} kills the run did not go on"
        if kills == 8:
            return
        shutil.rmtree(Path("runs") / name)  # it was faster than its killer: once more from the start


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tier", TIERS)
def test_thirty_two_kills_change_nothing(tier: str, place: Path) -> None:
    what = [*SMALL, *TIERS[tier], f"steps={STEPS}", "evaluation.sample_tokens=0"]
    begin = time.monotonic()
    whole = Process(target=train, args=([*what, "name=whole"], str(place)))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    killed_eight_times(what, "killed", place, time.monotonic() - begin, random.Random(tier))
    ours, theirs = last("killed"), last("whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    lines, expected = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
