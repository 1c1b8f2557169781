"""What is learned does not depend on how it is done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, weights
from trainkit import build
from trainkit import run as runs
from trainkit.errors import DivergedError
from trainkit.learner import Learner

# SGD without clipping: AdamW and clipping both hide a wrong gradient scale. Documents of different lengths: even label
# counts hide a wrong normaliser.
PLAIN = ["optimizer=sgd", "clip=0", "precision=fp64"]
ADAM = ["optimizer=adamw", "clip=1.0"]  # but they have the most state to lose on resume


def learned(learner: Callable[..., Learner], *overrides: str, steps: int = 6) -> torch.Tensor:
    it = learner(*overrides)
    for _ in range(steps):
        it.train_step()
    return weights(it)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_microbatches_learn_the_same(learner: Callable[..., Learner], rows: int) -> None:
    whole = learned(learner, *PLAIN)
    torch.testing.assert_close(learned(learner, *PLAIN, f"memory.microbatch={rows}"), whole, rtol=1e-9, atol=1e-12)


def test_the_text_of_these_tests_is_ragged(learner: Callable[..., Learner]) -> None:
    it = learner(*PLAIN)
    counts = {int((it.loader.at(s)["labels"] != -100).sum(1)[row]) for s in range(6) for row in range(4)}
    assert len(counts) > 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("memory", ["checkpoint", "offload_activations", "checkpoint+offload_activations"])
def test_memory_strategies_are_bitwise_neutral(learner: Callable[..., Learner], memory: str, dropout: float) -> None:
    plain = learned(learner, *ADAM, f"model.dropout={dropout}")
    assert torch.equal(learned(learner, *ADAM, f"model.dropout={dropout}", f"memory={memory}"), plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_matter(learner: Callable[..., Learner], workers: int) -> None:
    it = learner(*ADAM, f"data.workers={workers}")
    for _ in range(4):
        it.train_step()
    it.loader.close()
    assert torch.equal(weights(it), learned(learner, *ADAM, steps=4))


def test_dropout_is_another_in_every_step_and_for_every_seed(learner: Callable[..., Learner]) -> None:
    def losses(seed: int) -> list[float]:
        it = learner("model.dropout=0.5", "optimizer.lr=1e-30", f"seed={seed}")
        batch = it.loader.at(0)
        it.loader.at = lambda step: batch
        start = learner("model.dropout=0.5").model.state_dict()
        it.model.load_state_dict(start)
        return [float(it.train_step()["loss"]) for _ in range(4)]

    one, other = losses(0), losses(1)
    assert len({*one, *other}) == 8
    assert losses(0) == one


WAYS = {
    "adamw": ADAM,
    "muon": ["optimizer=muon", "clip=1.0"],
    "sgd": ["optimizer=sgd"],
    "fp16": [*ADAM, "precision=fp16"],
    "bf16": [*ADAM, "precision=bf16"],
    "dropout": [*ADAM, "model.dropout=0.3"],
    "learned": [*ADAM, "model.position=learned", "model.norm=layernorm", "model.bias=true", "model.tied=false"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(trained: Callable[..., build.Trainer], way: str) -> None:
    whole = trained(*WAYS[way], name="whole")
    trained(*WAYS[way], "stop_at=3", name="parts")
    parts = trained(*WAYS[way], "data.workers=1", "tracking=jsonl", name="parts")
    assert torch.equal(weights(parts.learner), weights(whole.learner))
    assert parts.learner.state() == whole.learner.state()
    lines = [
        {k: v for k, v in json.loads(line).items() if k in ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")}
        for name in ("whole", "parts")
        for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    ]
    stopped_at_3 = [{k: v for k, v in line.items() if k != "val_loss"} if line["step"] == 3 else line for line in lines]
    assert stopped_at_3[:6] == stopped_at_3[6:]
    assert [line["step"] for line in lines[6:]] == [1, 2, 3, 4, 5, 6]


def test_early_stopping_goes_on_where_it_was(trained: Callable[..., build.Trainer]) -> None:
    how = ["evaluation.every=1", "evaluation.patience=2", "steps=30", "optimizer.lr=1e-9", "evaluation.min_delta=0.5"]
    whole = trained(*how, name="whole")
    assert whole.learner.step == 3  # the first evaluation is the best, the next two are no better
    trained(*how, "stop_at=2", name="parts")
    parts = trained(*how, name="parts")
    assert (parts.learner.step, parts.best) == (whole.learner.step, whole.best)


def test_where_a_run_stopped_decides_nothing(trained: Callable[..., build.Trainer]) -> None:
    how = ["evaluation.every=4", "evaluation.patience=9", "steps=8", "optimizer.lr=1e-9", "evaluation.min_delta=0.5"]
    whole = trained(*how, name="whole")
    trained(*how, "stop_at=2", name="parts")  # it is evaluated there, as the last step of what was asked for
    parts = trained(*how, name="parts")
    assert parts.best == whole.best
    assert (whole.best.step, whole.best.stale) == (4, 1)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    def at(step: int, what: str) -> None:
        real = Learner.clip_gradients

        def poisoned(self: Learner) -> torch.Tensor:
            if self.step == step:
                next(p for p in self.parameters if p.grad is not None).grad.view(-1)[0] = float(what)  # type: ignore[union-attr]
            return real(self)

        monkeypatch.setattr(Learner, "clip_gradients", poisoned)

    return at


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_bad_step_is_not_trained_on(
    trained: Callable[..., build.Trainer], poison: Callable[[int, str], None], what: str, optimizer: str
) -> None:
    before = trained(f"optimizer={optimizer}", "stop_at=4", name="before")
    ids = before.learner.loader.at(4)["ids"].tolist()
    poison(4, what)
    with pytest.raises(DivergedError, match=r"step 5: .*not finite") as stopped:
        trained(f"optimizer={optimizer}", name="bad")
    assert str(ids) in str(stopped.value)
    kept = Path("runs/bad/checkpoints/step-0000000004")
    assert kept.is_dir()
    run = runs.composed([*SMALL, f"optimizer={optimizer}", "name=bad"])
    with build.trainer(run, Path("runs/bad")) as again:
        assert again.learner.step == 4
        assert torch.equal(weights(again.learner), weights(before.learner))
        theirs, ours = before.learner.tensors(), again.learner.tensors()
        assert all(torch.equal(theirs[k], ours[k]) for k in ours if k.startswith("optimizer."))


def test_fp16_overflow_skips_updates_and_halves_the_factor(learner: Callable[..., Learner]) -> None:
    it = learner(*ADAM, "precision=fp16")
    it.train_step()
    before = weights(it).clone()
    it.scaler.load_state_dict({**it.scaler.state_dict(), "scale": 2.0**120})
    it.train_step()
    assert torch.equal(weights(it), before)
    assert it.scaler.get_scale() == 2.0**119
    assert it.failed_at() is None
    it.scaler.load_state_dict({**it.scaler.state_dict(), "scale": 2.0**10})
    it.train_step()
    assert not torch.equal(weights(it), before)


def test_it_learns(learner: Callable[..., Learner]) -> None:
    it = learner(*ADAM, "optimizer.lr=0.01", "steps=60")
    losses = [float(it.train_step()["loss"]) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_gradient_is_clipped_to_its_norm(learner: Callable[..., Learner]) -> None:
    free = learner(*PLAIN)
    start = weights(free)
    norm = float(free.train_step()["grad_norm"])
    moved = weights(free) - start
    for share in (0.001, 0.9, 1.1):
        clipped = learner(*PLAIN, f"clip={share * norm}")
        assert float(clipped.train_step()["grad_norm"]) == pytest.approx(norm)
        torch.testing.assert_close(weights(clipped) - start, moved * min(share, 1), rtol=1e-4, atol=1e-12)
    assert torch.equal(weights(clipped), weights(free))
