"""Allocated bytes by category and phase, against arithmetic, saved-tensor hooks and the allocator itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.learner import Learner
from trainkit.profile.allocations import CATEGORIES, Allocations
from trainkit.profile.blocks import alive

B, T, D, V, H = 4, 32, 16, 320, 2  # of the small run: rows, positions, width, vocabulary, heads


def seen_in(it: Learner, steps: int = 1) -> Allocations:
    with Allocations(it.model, it.optimizer) as seen:
        for _ in range(steps):
            with seen.step(it.step + 1):
                it.train_step()
    return seen


def made(seen: Allocations, category: str, phase: str) -> int:
    return sum(b.bytes for b in seen.blocks if (b.category, b.phase) == (category, phase))


def test_parameters_gradients_and_states_by_arithmetic(learner: Callable[..., Learner]) -> None:
    it = learner("optimizer=adamw")
    count, tensors = sum(p.numel() for p in it.parameters), len(it.parameters)
    for _ in range(2):  # the states are made in the first step, and lived before the second one
        seen = seen_in(it)
        at_peak = seen.by_phase["optimizer"].at_peak
        assert at_peak["parameters"] == 4 * count
        assert at_peak["gradients"] == 4 * count
        assert at_peak["optimizer"] == 8 * count + 4 * tensors  # two moments, and a step count for each tensor
        assert at_peak["activations"] == 0
        assert at_peak["temporary"] < 1024
        for phase in seen.phases:
            assert sum(phase.at_peak.values()) == phase.peak
        assert list(seen.at_peak) == list(CATEGORIES)
        assert sum(seen.at_peak.values()) == seen.peak == seen.by_phase["backward"].peak


def test_activations_of_one_block_by_arithmetic(learner: Callable[..., Learner]) -> None:
    it = learner("model.depth=1", "model.mlp.activation=relu2")
    it.train_step()
    seen = seen_in(it)
    norm = 1 + 2 * D  # a root, the normalised and the scaled input
    attention = norm + 3 * D + 2 * D + (D + H) + D  # qkv; turned q and k; output and its normaliser; the sum
    mlp = norm + 4 * D + 4 * D + D  # relu, its square, the sum
    token = D + attention + mlp + norm + V  # the embedding before, the last norm and the log-softmax after
    documents = 2 * B * T * (D // H) + B * T * T  # cosines and sines of each position in its document; who sees whom
    scalars = 8 + 4 * 4  # the number of labels; the running total, the loss, nll's weight, backward's first gradient
    expected = 4 * (B * T * token + documents) + scalars
    assert made(seen, "activations", "forward") == expected
    backward = seen.by_phase["backward"].at_peak
    assert backward["activations"] == expected - 4  # nll's weight is gone
    assert backward["temporary"] == 2 * 4 * B * T * V  # gradients by the log-softmax and by the logits
    assert seen.peak == sum(backward.values())


def test_activations_are_what_autograd_says_it_saves() -> None:
    """A reference of its own: the memory behind saved tensors, each counted once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 8), nn.Softmax(-1))
    x = torch.randn(10, 24)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), x]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = model(x).square().sum()
    del kept
    with Allocations(model) as seen:
        model(x).square().sum().backward()
    scalars = 2 * 4  # the loss, and backward's first gradient
    assert made(seen, "activations", "forward") == sum(saved.values()) + scalars
    assert seen.by_phase["backward"].at_peak["gradients"] > 0


def test_the_levels_are_the_allocators_own() -> None:
    """What is alive at any time is what torch's own running total says, apart from what lived before."""
    from trainkit.profile import stream

    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    totals: list[int] = []

    def spy(tree: Any, device: torch.device) -> list[stream.Event]:
        below = list(tree)
        while below:
            it = below.pop()
            below += it.children
            if it.name == "[memory]":
                totals.append(it.extra_fields.total_allocated)
        return real(tree, device)

    real = stream.events
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "events", spy)
        with Allocations(model, optimizer) as seen:
            before = torch.ones(1)  # what lived in this process's earlier sessions stays in the allocator's total
            model(torch.randn(8, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    del before
    parameters = 4 * (64 * 64 + 64)
    assert seen.peak - parameters == max(totals) - min(totals) + 4


def test_a_checkpointed_block_keeps_its_input_and_is_made_again(learner: Callable[..., Learner]) -> None:
    def activations(phase: str, *overrides: str) -> int:
        return made(seen_in(learner("optimizer=sgd", *overrides)), "activations", phase)

    two, three = ("model.depth=2", "model.depth=3")
    block = activations("forward", three) - activations("forward", two)
    kept = activations("forward", three, "memory=checkpoint") - activations("forward", two, "memory=checkpoint")
    again = activations("backward", three, "memory=checkpoint") - activations("backward", two, "memory=checkpoint")
    assert kept == 4 * B * T * D + torch.get_rng_state().nbytes
    assert activations("backward", two) == 0
    assert again == block - 4 * B * T * D + 0  # all of it but what comes out, which is there


def test_every_microbatch_is_a_forward_and_a_backward(learner: Callable[..., Learner]) -> None:
    it = learner("optimizer=sgd", "memory.microbatch=1")
    seen = seen_in(it, steps=2)
    phases = {(p.step, p.phase): p for p in seen.phases}
    assert [key for key in phases if key[0] > 0] == [
        (s, p) for s in (1, 2) for p in ("forward", "backward", "optimizer")
    ]
    assert len(phases[1, "forward"].spans) == len(phases[1, "backward"].spans) == 4
    gradients = 4 * sum(p.numel() for p in it.parameters)
    assert phases[1, "forward"].at_peak["gradients"] == gradients  # of the microbatches before
    whole = made(seen_in(learner("optimizer=sgd")), "activations", "forward")
    one = [b.bytes for b in alive(seen.blocks, phases[2, "forward"].at) if b.category == "activations"]
    assert sum(one) < whole / 3


def test_other_phases_are_named(learner: Callable[..., Learner]) -> None:
    it = learner()
    with Allocations(it.model, it.optimizer) as seen:
        with seen.step(1):
            it.train_step()
        with seen.phase("evaluation"):
            it.task.evaluate(it.model, it.loader.validation(1), ranks=it.ranks, stop=lambda: False)
        with seen.phase("save"):
            copies = [p.detach().clone() for p in it.parameters]
        with seen.step(2):
            it.train_step()
    names = [(p.step, p.phase) for p in seen.phases if p.phase != "outside"]
    step = ["forward", "backward", "optimizer"]
    assert names == [*((1, p) for p in step), (-1, "evaluation"), (-1, "save"), *((2, p) for p in step)]
    save = seen.by_phase["save"].at_peak
    copied = sum(c.nbytes for c in copies)
    assert copied <= save["temporary"] < copied + 1024
    assert made(seen, "temporary", "save") >= copied  # also when the next backward finds it there
    assert made(seen, "activations", "save") == 0
    evaluation = seen.by_phase["evaluation"].at_peak
    assert evaluation["activations"] == evaluation["gradients"] == 0
    assert evaluation["temporary"] >= 4 * B * T * V


def test_what_lived_before_may_end(learner: Callable[..., Learner]) -> None:
    """Nobody reports the end of memory that is older than the profiler."""
    model = nn.Linear(50, 50)
    model(torch.ones(1, 50)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters())
    size = 4 * (50 * 50 + 50)
    with Allocations(model, optimizer) as seen:
        with seen.phase("before"):
            pass
        optimizer.zero_grad()
        with seen.phase("after"):
            pass
    assert seen.by_phase["before"].at_peak["gradients"] == size
    assert seen.by_phase["after"].at_peak["gradients"] == 0
    assert seen.at_peak["parameters"] == size


def test_states_of_two_optimizers_in_one(learner: Callable[..., Learner]) -> None:
    it = learner("optimizer=muon")
    it.train_step()
    inside = sum(p.numel() for n, p in it.model.named_parameters() if "blocks" in n and p.ndim == 2)
    rest = [p for n, p in it.model.named_parameters() if not ("blocks" in n and p.ndim == 2)]
    states = 4 * inside + sum(8 * p.numel() + 4 for p in rest)
    assert seen_in(it).at_peak["optimizer"] == states


def test_a_failure_inside_leaves_the_profiler_free(learner: Callable[..., Learner]) -> None:
    it = learner()
    with pytest.raises(ZeroDivisionError), Allocations(it.model) as seen:
        1 / 0  # noqa: B018
    assert not hasattr(seen, "peak")
    assert seen_in(it).peak > 0


def test_compiled_blocks_are_seen(learner: Callable[..., Learner]) -> None:
    it = learner("compile=blocks", "optimizer=sgd")
    for _ in range(2):
        it.train_step()
    seen, plain = seen_in(it), seen_in(learner("optimizer=sgd"))
    assert seen.by_phase["optimizer"].at_peak["gradients"] == plain.by_phase["optimizer"].at_peak["gradients"]
    compiled, eager = (made(s, "activations", "forward") for s in (seen, plain))
    assert 0.4 * eager < compiled < 1.1 * eager
    assert [p.phase for p in seen.phases if p.step > 0] == ["forward", "backward", "optimizer"]


def sharded(kind: str) -> None:
    run = runs.composed([*SMALL, "name=t", f"parallel={kind}", "optimizer=adamw"])
    it = build.learner(run, run.data.open(), build.ranks(run))
    whole = 4 * sum(p.numel() for p in it.parameters)
    it.train_step()
    seen = seen_in(it)
    if kind == "ddp":
        at_peak = seen.by_phase["optimizer"].at_peak
        assert at_peak["parameters"] == whole
        assert 2 * whole <= at_peak["gradients"] < 2 * whole + 64  # the bucket that is summed, and numbers to compare
        assert at_peak["optimizer"] == 2 * whole + 4 * len(it.parameters)
    else:
        update = max(b.begin for b in seen.blocks if b.phase == "optimizer")  # when all is summed
        held = dict.fromkeys(CATEGORIES, 0)
        for block in alive(seen.blocks, update):
            held[block.category] += block.bytes
        assert held["parameters"] == whole / 2
        assert held["optimizer"] == whole + 4 * len(it.parameters)
        assert whole / 2 <= held["gradients"] < whole / 2 + 64  # and numbers to compare
        gathered = seen.by_phase["forward"].at_peak["parameters"]
        assert whole / 2 < gathered < 2 * whole
    it.ranks.leave()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_hold_their_part(kind: str) -> None:
    in_ranks(2, sharded, kind)
