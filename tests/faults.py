"""A machine that computes wrongly without saying so: at one computation of one step, on one rank. Runs on it, and on sound
ones with bad data."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conftest import SMALL
from tests.test_guard import with_many
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load
from trainkit.learner import Learner
from trainkit.signals import Signals
from trainkit.tasks import CausalLM
from trainkit.tracking import Trackers
from trainkit.trainer import Trainer

TWENTY = [*SMALL, "steps=20", "checkpoint.every=4", "checkpoint.keep=9", "evaluation.sample_tokens=0"]
LOGGED = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "val_loss")
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "large": lambda x: x * 2.0**16,  # a flipped bit of the exponent
    "slight": lambda x: x * (1 + 2.0**-20),  # and of the mantissa
}


@dataclass(frozen=True)
class Fault:
    """At the computations `tries` of step `step` on `rank`, one number of an activation (`forward`), of its gradient
    (`backward`) or of a summed gradient (`summed`) is wrong."""

    step: int
    where: str = "forward"
    wrong: str = "nan"
    rank: int = 0
    tries: tuple[int, ...] = (0,)


@contextmanager
def machine(*faults: Fault) -> Iterator[list[int]]:
    """Inside, learners have these faults. Gives the steps that were computed, by their number before the update."""
    real, computed = Learner.compute, []

    def compute(self: Learner, batch: Any) -> Any:
        tries = computed.count(self.step)
        computed.append(self.step)
        now = [f for f in faults if f.step == self.step and f.rank == self.ranks.rank and tries in f.tries]
        hooks = [_hook(self, fault) for fault in now if fault.where != "summed"]
        clip = self.clip_gradients

        def clip_gradients() -> Any:
            for fault in now:
                if fault.where == "summed":
                    grad = self.parameters[0].grad
                    assert grad is not None
                    _spoil(grad, fault)
            return clip()

        self.clip_gradients = clip_gradients  # type: ignore[method-assign]
        try:
            return real(self, batch)
        finally:
            self.clip_gradients = clip  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    Learner.compute = compute  # type: ignore[method-assign]
    try:
        yield computed
    finally:
        Learner.compute = real  # type: ignore[method-assign]


def _hook(learner: Learner, fault: Fault) -> Any:
    fired = []

    def forward(module: Any, inputs: Any, hidden: Tensor) -> Tensor | None:
        if fired:
            return None
        fired.append(True)
        if fault.where == "backward":
            hidden.register_hook(lambda grad: _spoil(grad.clone(), fault))
            return None
        return _spoil(hidden.clone(), fault)

    return learner.model.backbone.norm.register_forward_hook(forward)  # type: ignore[union-attr, operator]


def _spoil(numbers: Tensor, fault: Fault) -> Tensor:
    local = numbers.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    flat = local.view(-1)
    place = int(flat.abs().argmax())
    flat[place : place + 1] = WRONG[fault.wrong](flat[place : place + 1])
    return numbers


def fit(name: str, *overrides: str, faults: tuple[Fault, ...] = (), signals: Signals | None = None) -> Trainer:
    """Train on a machine with these faults. What was noted is in `runs/NAME/notes`."""
    run = runs.composed([*TWENTY, *overrides, f"name={name}"])
    folder = Path("runs") / name
    with machine(*faults) as computed, noting(folder), build.trainer(run, folder, signals=signals) as trainer:
        trainer.fit()
    trainer.computed = computed  # type: ignore[attr-defined]
    return trainer


@contextmanager
def noting(folder: Path) -> Iterator[None]:
    real = Trackers.note

    def note(self: Trackers, message: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            with (folder / "notes").open("a") as opened:
                opened.write(f"{message}\n")
        real(self, message)

    Trackers.note = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trackers.note = real  # type: ignore[method-assign]


@contextmanager
def bad_data(samples: set[int], factor: float = float("nan")) -> Iterator[None]:
    """Batches with one of these samples are bad, on whichever machine and however often."""
    real = CausalLM.backward

    def backward(self: CausalLM, model: Any, batch: Any, **how: Any) -> dict[str, Any]:
        metrics = real(self, model, batch, **how)
        mine = torch.tensor(float(bool(samples & set(batch["ids"].tolist()))))
        if how["ranks"].sum(mine) > 0:
            metrics["loss"] = metrics["loss"] * factor
        if mine:
            metrics["own_loss"] = metrics["own_loss"] * factor
        return metrics

    CausalLM.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        CausalLM.backward = real  # type: ignore[method-assign]


def said(name: str) -> list[str]:
    """What was noted about steps that were computed again."""
    return [line for line in Path(f"runs/{name}/notes").read_text().splitlines() if ", computed " in line]


def learned(name: str) -> dict[str, torch.Tensor]:
    return dict(load(find.resolve(name, Path("runs"), launch.policy)).tensors)


def logged(name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in LOGGED if k in line} for line in lines]


def equal(name: str, other: str, *, logs: bool = True) -> None:
    """Two runs learned the same to the bit, and logged the same. (Without `logs`, for where one was to stop: what it
    evaluated there, and the seed of what it computed last, do not count.)"""
    one, two = ({k: v for k, v in learned(n).items() if logs or k != "random.torch"} for n in (name, other))
    assert one.keys() == two.keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []
    assert logged(name) == logged(other) or not logs


def order(place: Path) -> list[list[int]]:
    with_many(place)
    for i in range(60, 120):
        (place / "corpus" / f"yet-{i}.txt").write_text(f"line {i} says {i * i} and then {i**3}. " * 6)
    run = runs.composed([*TWENTY, "name=probe"])
    loader = run.data.build(run.data.open(), seed=run.seed, ranks=build.ranks(run), device=torch.device("cpu"))
    return [loader.at(i)["ids"].tolist() for i in range(40)]
