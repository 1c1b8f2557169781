"""One of two ranks runs out of memory: both go back where they can, and both are started again where they cannot."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.errors import RanOutError
from trainkit.fitting import largest
from trainkit.models.decoder import Backbone

PLAIN = ["optimizer=sgd", "optimizer.lr=0.1", "clip=0", "precision=fp64", "data.batch=8", "evaluation.sample_tokens=0"]
forward = Backbone.forward


def both_go_back() -> None:
    run = runs.composed([*SMALL, *PLAIN, "parallel=ddp", "name=t"])
    joined = build.ranks(run)

    def learned(*overrides: str) -> list[torch.Tensor]:
        it = build.learner(
            runs.composed([*SMALL, *PLAIN, "parallel=ddp", "name=t", *overrides]), corpus, replace(joined)
        )
        for _ in range(3):
            it.train_step()
        assert not it.ranks.careful
        assert it.fitting.rows == 2
        return [p.detach().clone() for p in it.model.parameters()]

    corpus = run.data.open()
    half = learned("memory.microbatch=2")

    def limited(self: Backbone, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(tokens) > 2 and joined.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return forward(self, tokens, *args, **kwargs)

    Backbone.forward = limited  # type: ignore[method-assign]
    assert all(torch.equal(a, b) for a, b in zip(learned(), half, strict=True))
    assert largest(build.learner(run, corpus, replace(joined))) == 2
    assert largest(build.learner(run, corpus, replace(joined)), start=4) == 2


def test_the_first_step_is_summed_when_all_have_come_through_it() -> None:
    in_ranks(2, both_go_back)


def sharded_cannot() -> None:
    run = runs.composed([*SMALL, *PLAIN, "parallel=fsdp", "name=t"])
    it = build.learner(run, run.data.open(), build.ranks(run))
    asked: list[int] = []
    it.fitting.changed = asked.append

    def limited(self: Backbone, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    Backbone.forward = limited  # type: ignore[method-assign]
    with pytest.raises(RanOutError, match="4 rows at once are too many .*: started again, it goes on with 2"):
        it.train_step()
    with pytest.raises(RanOutError, match="1 rows at once are too many"):
        largest(it)
    assert asked == [2, 1]


def test_slices_are_summed_inside_a_forward_so_that_nobody_goes_back() -> None:
    in_ranks(2, sharded_cannot)


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from trainkit import cli
from trainkit.learner import Learner

real = Learner.gradients
def gradients(self, batch, rows):
    if self.step == 3 and rows > 2 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    return real(self, batch, rows)
Learner.gradients = gradients
cli.main(sys.argv[1:])
"""


@pytest.mark.timeout(240)
def test_in_the_middle_of_sums_torchrun_starts_all_of_them_again_with_half() -> None:
    Path("script.py").write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    words = [*SMALL, *PLAIN, "parallel=ddp", "name=r", "checkpoint.every=1", "tracking=console+jsonl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, "script.py", "train", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = Path("runs/r/logs/rank-1.log").read_text()
    assert "4 rows at once are too many (CUDA out of memory. Tried): started again, it goes on with 2" in said
    lines = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert [line["microbatch"] for line in lines] == [4, 4, 4, 2, 2, 2]
