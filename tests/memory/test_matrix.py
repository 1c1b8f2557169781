"""The pairs of strategies that neither tests of activations nor tests of steps have: between them all pairs are tested."""

from collections.abc import Callable
from functools import cache
from itertools import combinations

import pytest
import torch

from tests.conftest import SMALL
from tests.memory import test_grades, test_steps
from tests.memory.test_grades import equal, learned
from trainkit import run as runs
from trainkit.choices import choices
from trainkit.errors import UserError
from trainkit.learner import Learner

MODEL, STEP = ["selective", "stream", "fused_loss"], ["8bit", "4bit", "fp8", "offload_optimizer", "step_in_backward"]
REFUSED = {
    ("stream", "offload_optimizer"): "memory=stream steps on the host already: memory=offload_optimizer must go",
    ("stream", "step_in_backward"): "memory=stream brings gradients to the host after the backward",
}
HOW = ["model.width=64", "data.batch=2", "clip=0", "optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1"]


@pytest.mark.parametrize("of_step", STEP)
@pytest.mark.parametrize("of_model", MODEL)
def test_what_is_about_the_model_goes_with_what_is_about_the_step(of_model: str, of_step: str) -> None:
    """To the bit what the second one alone learns; `fused_loss` adds in another order."""
    both = f"memory={of_model}+{of_step}"
    if said := REFUSED.get((of_model, of_step)):
        with pytest.raises(UserError, match=said) as refused:
            runs.composed([*SMALL, *HOW, both])
        assert "\n" not in str(refused.value)
        return
    ours, alone = learned(*HOW, both, steps=2), learned_by(of_step)
    if of_model != "fused_loss":
        assert equal(ours, alone)
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


@cache
def learned_by(strategy: str) -> list[torch.Tensor]:
    """What it learns alone, which is asked for once a pair."""
    return learned(*HOW, f"memory={strategy}", steps=2)


def test_every_pair_is_tested() -> None:
    """Also of strategies that come after this was written."""
    known = {name for name in choices()["memory"] if name not in ("baseline", "default")}
    matrices = [test_grades.STRATEGIES, test_steps.STRATEGIES]
    tested = {frozenset(pair) for names in matrices for pair in combinations(names, 2)}
    tested |= {frozenset((a, b)) for a in MODEL for b in STEP}
    assert {frozenset(pair) for pair in combinations(known, 2)} <= tested


def test_what_goes_over_and_comes_back_is_counted(learner: Callable[..., Learner]) -> None:
    it = learner("memory=offload_optimizer")
    size = sum(p.nbytes for p in it.parameters)
    for steps in (1, 2):
        for _ in range(steps):
            it.train_step()
        told = it.account()  # of a step, since it was asked before
        assert told["offload_optimizer_gb"] == pytest.approx(2 * size / 1e9)
        assert told["offload_optimizer_wait_s"] == 0  # nobody waits where all is on the host
