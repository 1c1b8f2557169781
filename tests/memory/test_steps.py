"""Where and when the optimizer's step is made, and what gradients are added up in."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, weights
from trainkit import build
from trainkit import run as runs
from trainkit.errors import DivergedError, UserError
from trainkit.learner import Learner
from trainkit.optimizers import offloaded
from trainkit.optimizers.in_backward import InBackward
from trainkit.optimizers.offloaded import Offloaded

OPTIMIZERS = ["adamw", "sgd", "muon"]


def learned(it: Learner, steps: int = 4) -> torch.Tensor:
    for _ in range(steps):
        it.train_step()
    return weights(it)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_on_the_cpu_is_the_same_step(
    learner: Callable[..., Learner], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloaded, "BUCKET_BYTES", 3000)
    how = [f"optimizer={optimizer}", "memory.microbatch=2", "precision=fp16" if optimizer == "adamw" else "clip=0.5"]
    plain, other = learner(*how), learner(*how, "memory=offload_optimizer")
    assert isinstance(other.optimizer, Offloaded)
    assert len(other.optimizer._buckets) > 2
    assert torch.equal(learned(other), learned(plain))
    assert torch.equal(torch.cat([c.detach().flatten() for c in other.optimizer._copies.values()]), weights(other))
    theirs, ours = plain.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if not k.startswith("random."))


def test_two_buckets_of_gradients_are_on_the_cpu_at_most(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloaded, "BUCKET_BYTES", 3000)
    it = learner("memory=offload_optimizer")
    optimizer, alive, most = it.optimizer, [], []
    assert isinstance(optimizer, Offloaded)
    fetch, step = optimizer._fetch, optimizer.inner.step

    def fetched(number: int) -> Any:
        alive.append(number)
        return fetch(number)

    def stepped() -> None:
        there = [p for p, copy in optimizer._copies.items() if copy.grad is not None]
        assert there == optimizer._buckets[len(most)]
        most.append(max(alive) - len(most))
        step()

    monkeypatch.setattr(optimizer, "_fetch", fetched)
    monkeypatch.setattr(optimizer.inner, "step", stepped)
    it.train_step()
    assert len(most) == len(optimizer._buckets)
    assert set(most) == {1}  # the next bucket is on its way while one is stepped


@pytest.mark.parametrize("way", ["baseline", "8bit"])
def test_offloaded_runs_resume_and_change_back(trained: Callable[..., build.Trainer], way: str) -> None:
    """Also with a checkpoint read into the model before a step: the copies on the CPU take it over."""
    how = ["model.width=64", f"memory={way}"]
    away = ["model.width=64", f"memory={way}+offload_optimizer"]
    whole = trained(*how, name="whole")
    trained(*away, "stop_at=2", name="parts")
    trained(*how, "stop_at=4", name="parts")
    parts = trained(*away, name="parts")
    assert torch.equal(weights(parts.learner), weights(whole.learner))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_in_the_backward_is_the_same_step(learner: Callable[..., Learner], optimizer: str) -> None:
    how = [f"optimizer={optimizer}", "clip=0", "model.tied=true"]
    plain, other = learner(*how), learner(*how, "memory=step_in_backward")
    assert torch.equal(learned(other), learned(plain))
    one, two = plain.train_step(), other.train_step()
    assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-6)
    assert two["lr"] == one["lr"]
    assert other.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]


def test_never_more_than_one_gradient_is_held(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, list[int]] = {"plain": [], "in backward": []}
    for name, memory in (("plain", "baseline"), ("in backward", "step_in_backward")):
        it = learner("clip=0", f"memory={memory}")
        for p in it.parameters:
            # before the optimizer's own: a hook that comes first sees what is held as a gradient arrives
            hooks = p._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]
            kept = dict(hooks)
            hooks.clear()
            p.register_post_accumulate_grad_hook(
                lambda _, it=it, name=name: counts[name].append(sum(q.grad is not None for q in it.parameters))
            )
            for hook in kept.values():
                p.register_post_accumulate_grad_hook(hook)
        it.train_step()
        assert len(counts[name]) == len(it.parameters)
        assert all(p.grad is None for p in it.parameters)
    assert max(counts["in backward"]) == 1
    assert max(counts["plain"]) == len(counts["plain"])


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, name: str) -> None:
    """Let the gradient of the parameter whose name ends so be infinite at that step, as it arrives."""
    real = InBackward._arrived

    def arrived(self: InBackward, parameter: torch.Tensor) -> None:
        if name_of.get(id(parameter), "").endswith(name) and steps[-1] == step and not done:
            parameter.grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
            done.append(step)  # once
        real(self, parameter)

    steps, name_of, done = [-1], {}, []
    train = Learner.train_step

    def train_step(self: Learner) -> Any:
        steps.append(self.step)
        name_of.update({id(p): n for n, p in self.model.named_parameters()})
        return train(self)

    monkeypatch.setattr(InBackward, "_arrived", arrived)
    monkeypatch.setattr(Learner, "train_step", train_step)


def test_a_loss_that_is_not_finite_changes_no_weight(
    trained: Callable[..., build.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["clip=0", "memory=step_in_backward"]
    before = trained(*how, "stop_at=3", name="before")
    it = before.learner
    kept, state = weights(it).clone(), {k: v.clone() for k, v in it.tensors().items()}
    real = it.task.backward
    monkeypatch.setattr(
        type(it.task), "backward", lambda self, *a, **k: real(*a, **{**k, "scale": lambda loss: loss * torch.inf})
    )
    it.train_step()
    assert it.failed_at() == 3
    assert not it.torn()
    assert torch.equal(weights(it), kept)
    assert all(torch.equal(it.tensors()[k], v) for k, v in state.items() if k.startswith("optimizer."))


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_weights_of_no_step_are_never_saved(
    trained: Callable[..., build.Trainer], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The embedding's gradient comes last: all other weights are updated by then."""
    how = ["clip=0", "memory=step_in_backward", f"guard.policy={policy}", "checkpoint.every=2", "guard.pass_over=1"]
    poisoned(monkeypatch, 3, "embed.weight")
    if policy == "stop":
        with pytest.raises(
            DivergedError, match=r"only some weights made it, so that none are saved: go on from the newest"
        ):
            trained(*how, name="bad")
        assert sorted(p.name for p in Path("runs/bad/checkpoints").glob("step-*")) == ["step-0000000002"]
        return
    back = trained(*how, name="bad")
    monkeypatch.undo()
    assert back.learner.step == 6
    assert back.learner.history[0].to == 2
    assert torch.isfinite(weights(back.learner)).all()
    assert not back.learner.torn()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clip=1"], "the gradient's norm is not known yet: set clip=0"),
        (["memory.microbatch=2"], "microbatches of 2 rows add their gradients up first: set memory.microbatch=null"),
        (["precision=fp16"], "precision=fp16 leaves out updates that overflow: use precision=bf16"),
        (["guard=skip"], "guard=skip leaves out single updates: use guard.policy=stop or guard=rewind"),
        (["guard.spike=5"], "guard.spike looks at the loss of all ranks first: set guard.spike=null"),
        (["parallel=ddp"], "parallel=ddp sums gradients after it: use parallel=fsdp"),
        (["deterministic=elastic"], "deterministic=elastic sums gradients after it: use deterministic=layout"),
        (["memory=step_in_backward+offload_optimizer"], "memory=offload_optimizer wants many gradients at once"),
        (["memory.grad_dtype=bfloat16"], "memory.grad_dtype is for gradients that are kept"),
    ],
)
def test_what_needs_all_gradients_first_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        runs.composed([*SMALL, "clip=0", "memory=step_in_backward", *words])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["precision=fp64"], "would round what precision.params=float64 keeps"),
        (["parallel=fsdp"], "parallel=fsdp keeps gradients in the parameters' format"),
        (["deterministic=elastic"], "deterministic=elastic adds gradients up as integers"),
        (["optimizer=muon"], "optimizer=muon takes gradients in its parameters' format"),
    ],
)
def test_gradients_of_another_format_are_refused_where_they_make_no_sense(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        runs.composed([*SMALL, "memory.grad_dtype=bfloat16", *words])
    with pytest.raises(UserError, match="has no states to shrink in optimizer=sgd"):
        runs.composed([*SMALL, "memory=8bit", "optimizer=sgd", "optimizer.momentum=0"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradients_are_added_up_in_the_format_that_was_asked_for(
    learner: Callable[..., Learner], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = [f"optimizer={optimizer}", "memory.microbatch=1", "clip=1"]
    plain, same = learner(*how), learner(*how, "memory.grad_dtype=float32")
    narrow = learner(*how, "memory.grad_dtype=bfloat16")
    assert torch.equal(learned(same, 2), learned(plain, 2))
    start = {id(p): p.detach().clone() for p in narrow.parameters}
    grads: list[torch.Tensor] = []
    real = narrow.clip_gradients
    monkeypatch.setattr(
        narrow, "clip_gradients", lambda: (grads.extend(p.grad.clone() for p in narrow.parameters), real())[1]
    )
    norm = float(narrow.train_step()["grad_norm"])
    assert {g.dtype for g in grads} == {torch.bfloat16}
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    assert norm == pytest.approx(float(exact), rel=1e-5)  # not rounded to bfloat16 on the way
    fresh = learner(*how)
    fresh.train_step()
    narrow.train_step()
    moved = torch.cat([(p.detach() - start[id(p)]).flatten() for p in narrow.parameters])
    fresh.train_step()
    assert float((weights(fresh) - weights(narrow)).norm() / moved.norm()) < 0.1


def test_parameters_of_bfloat16_add_up_in_float32() -> None:
    """The other way round, on a model whose parameters are bfloat16: small gradients do not vanish beside large ones."""
    from trainkit.memory import Memory
    from trainkit.optimizers import SGD, step
    from trainkit.optimizers import build as build_optimizer

    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    start = model.weight.detach().float().clone()
    memory = Memory(grad_dtype="float32")
    memory.apply(model)
    optimizer = build_optimizer(SGD(lr=1 / 64, momentum=0.0), model, memory, compiled=False)
    for size in (1.0, *[2.0**-9] * 256):
        (model.weight.sum() * size).backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    assert torch.equal(model.weight.grad, torch.full((4, 4), 1.5))  # bfloat16 would have stayed at 1
    step(optimizer, torch.zeros(()))
    torch.testing.assert_close(model.weight.detach().float(), start - 1.5 / 64, rtol=0, atol=2e-3)


FORMATS = {"8bit": "int8", "4bit": "int4", "fp8": "fp8"}
STRATEGIES = ["checkpoint", "offload_activations", "8bit", "4bit", "fp8", "offload_optimizer", "step_in_backward"]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(STRATEGIES, 2)))
def test_every_pair_works_or_is_refused_in_one_sentence(learner: Callable[..., Learner], one: str, other: str) -> None:
    """Together they learn what the approximate one of them learns alone, to the bit."""
    refused = {
        ("8bit", "4bit"): "take one of the two",
        ("8bit", "fp8"): "take one of the two",
        ("4bit", "fp8"): "take one of the two",
        ("offload_optimizer", "step_in_backward"): "wants many gradients at once",
    }
    how = ["clip=0", "model.width=64", "data.length=16", "data.batch=2"]
    if said := refused.get((one, other)):
        with pytest.raises(UserError, match=said):
            learner(*how, f"memory={other}+{one}")
        return
    alone = next((s for s in (one, other) if s in FORMATS), "baseline")
    both = learner(*how, f"memory={other}+{one}")
    assert torch.equal(learned(both, 2), learned(learner(*how, f"memory={alone}"), 2))
    assert alone == "baseline" or any(key.endswith(f"_{FORMATS[alone]}_scale") for key in both.tensors())


def test_a_person_is_told_the_grades() -> None:
    run = runs.composed([*SMALL, "memory=offload_optimizer+8bit+checkpoint", "memory.grad_dtype=bfloat16"])
    told = "checkpoint (exact) + 8bit (approximate) + offload_optimizer (exact) + gradients in bfloat16"
    assert run.memory.describe() == f"{told} + fused_loss where logits are large (reordered)"
    assert runs.composed([*SMALL, "memory=baseline"]).memory.describe() == "baseline"
    for words, told in {
        "memory=4bit": "4bit (approximate)",
        "memory=selective": "selective (exact)",
        "memory=checkpoint memory.checkpoint.every=3": "checkpoint every 3 blocks (exact)",
        "memory=checkpoint memory.checkpoint.budget=0.5 compile=full": (
            "checkpoint within 0.5 of the activations (reordered)"
        ),
    }.items():
        found = runs.composed([*SMALL, *words.split()]).memory.describe()
        assert found == f"{told} + fused_loss where logits are large (reordered)"
