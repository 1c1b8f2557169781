"""What an offloaded step moves, and waits for, is counted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from trainkit import stalls
from trainkit.learner import Learner
from trainkit.parallel import waits


def test_what_goes_over_and_comes_back_is_counted(learner: Callable[..., Learner]) -> None:
    it = learner("memory=offload_optimizer")
    size = sum(p.nbytes for p in it.parameters)
    for steps in (1, 2):
        for _ in range(steps):
            it.train_step()
        told = it.account()  # of a step, since it was asked before
        assert told["offload_optimizer_gb"] == pytest.approx(2 * size / 1e9)
        assert told["offload_optimizer_wait_s"] == 0  # nobody waits where all is on the host


class Clock:
    """Stands still but for what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stalls.time, "perf_counter", lambda: self.now)

    def go(self, seconds: float) -> None:
        self.now += seconds


def test_a_wait_is_from_in_front_of_the_hooks_that_are_there_to_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def waits_in_backward(module: nn.Module, given: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: clock.go(10))

    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    for layer in model:  # as FSDP does
        layer.register_forward_pre_hook(lambda *_: clock.go(1), prepend=True)
        layer.register_forward_hook(waits_in_backward)
        layer.weight.register_hook(lambda _: clock.go(100))  # the computation itself
    it = waits.Waits(model, torch.device("cpu"))
    for passes in (1, 2):
        for _ in range(passes):
            model(torch.ones(1, 2)).sum().backward()
        assert it.stats() == {"stream_wait_s": passes * 3 * 11}  # since it was asked before
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert it.stats() == {"stream_wait_s": 3}


def test_what_a_streamed_step_waits_for_is_counted(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    wait = FSDPParamGroup.wait_for_unshard

    def waiting(group: FSDPParamGroup) -> None:
        if group.is_unsharded is False:
            clock.go(1)
        wait(group)

    monkeypatch.setattr(FSDPParamGroup, "wait_for_unshard", waiting)
    it = learner("memory=stream", "model.depth=3")
    size, blocks = (sum(p.numel() * 4 for p in of.parameters()) for of in (it.model, it.model.backbone.blocks))
    for steps in (1, 2):
        for _ in range(steps):
            it.train_step()
        told = it.account()
        assert told["stream_wait_s"] == 3 + 1 + 3  # forwards, what lies outside of blocks, backwards
        assert told["stream_gb"] == pytest.approx((size + blocks + size) / 1e9)
