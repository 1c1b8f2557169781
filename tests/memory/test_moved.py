"""What an offloaded step moves is counted."""

from collections.abc import Callable

import pytest

from trainkit.learner import Learner


def test_what_goes_over_and_comes_back_is_counted(learner: Callable[..., Learner]) -> None:
    it = learner("memory=offload_optimizer")
    size = sum(p.nbytes for p in it.parameters)
    for steps in (1, 2):
        for _ in range(steps):
            it.train_step()
        told = it.account()  # of a step, since it was asked before
        assert told["offload_optimizer_gb"] == pytest.approx(2 * size / 1e9)
        assert told["offload_optimizer_wait_s"] == 0  # nobody waits where all is on the host
