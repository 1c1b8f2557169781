"""What learns: a model, its optimizer and a step count. It writes nothing and knows no folder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainkit import memory, optimizers, precision, randomness, states
from trainkit.checkpoint.store import on_cpu
from trainkit.checkpoint.tensors import DTYPES
from trainkit.exact import ExactSums
from trainkit.fitting import Fitting
from trainkit.guard import Guard, Rewind, position
from trainkit.spikes import Spikes

T = TypeVar("T")
ANSWER = ("loss", "grad_norm", "own_loss", "own_gradients")  # by which two computations of a step are compared
MODEL, OPTIMIZER, RANDOM, GUARD = "model.", "optimizer.", "random.", "guard."


@dataclass
class Learner:
    """A model that learns step by step. `step` counts the updates made; `steps` is the schedule's horizon.

    A step is a function of (weights, optimizer state, step): data order, dropout's seed and learning rate are all
    computed from `step`, so that nothing else needs restoring.
    """

    task: Any
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    loader: Any
    ranks: Any
    scaler: torch.amp.GradScaler
    seed: int
    steps: int
    clip: float
    microbatch: int  # rows that go through the model at once, to begin with
    guard: Guard = field(default_factory=Guard)
    exact: bool = False  # sums over rows that do not depend on how many ranks share them
    history: list[Rewind] = field(default_factory=list)
    step: int = 0
    first_bad: Tensor = field(init=False)  # the step, -1 where none was
    bad_answer: Tensor = field(init=False)  # what that step gave, float64
    in_a_row: Tensor = field(init=False)  # steps that were left out just before

    def __post_init__(self) -> None:
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]  # the config's word, before any load
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.forget_bad()
        self.spikes = Spikes(self.guard.spike, self.guard.window, self.ranks.device)
        self.fitting = Fitting(
            1 if self.exact else min(self.microbatch, self.loader.batch // self.ranks.readers), self.ranks
        )
        self.told = self.step  # at which `account` was asked last
        self.sums = ExactSums(self.parameters, self.seed_row, self.ranks.sum) if self.exact else None

    def train_step(self) -> dict[str, Tensor | float]:
        """One update from one global batch. The metrics are tensors: only the loop's log waits for the device."""
        return self.update(self.compute(self.batch()))

    def batch(self) -> dict[str, Tensor]:
        """This rank's rows of what the next update learns from. A rank's pace is taken from here on."""
        self.ranks.pace.begin()
        batch: dict[str, Tensor] = self.loader.at(self.position)
        return batch

    def compute(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave the clipped gradients of the global batch in the parameters, and change nothing else, so that a step can be
        computed as often as one likes: `update` or `discard` comes next. The metrics hold `ANSWER`."""
        self.set_lr()  # an update may be made in the backward
        optimizers.begin(self.optimizer, randomness.mix(self.seed, self.step))
        if self.steps_in_backward:  # which cannot be done again
            metrics = self.gradients(batch, self.fitting.rows)
        else:
            metrics = self.fitting.run(self.model, lambda rows: self.gradients(batch, rows))
        self.scaler.unscale_(self.optimizer)
        norm, own = self.clip_gradients()
        return {"own_loss": metrics["loss"], **metrics, "grad_norm": norm, "own_gradients": own}

    def update(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        """Make the update of what `compute` left, unless it must not be made. The step is done either way."""
        answer = torch.stack([metrics[name].detach().double() for name in ANSWER])
        lr = self.set_lr()
        skip = self.unfit(metrics["loss"], metrics["grad_norm"], answer)
        optimizers.step(self.optimizer, skip=skip.to(self.ranks.home))
        precision.update_scaler(self.scaler, keep=self.first_bad >= 0)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value for name, value in metrics.items() if not name.startswith("own_")} | {"lr": lr}

    def discard(self) -> None:
        """As if `compute` had not been called."""
        precision.update_scaler(self.scaler, keep=torch.ones_like(self.first_bad, dtype=torch.bool))
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, batch: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        """Give the parameters this step's gradients of `batch`, `rows` of it at a time."""
        torch.manual_seed(randomness.mix(self.seed, self.step, self.ranks.rank))
        metrics: dict[str, Any] = self.task.backward(
            self.model, batch, microbatch=rows, ranks=self.ranks, scale=self.scaler.scale, exact=self.sums
        )
        return metrics

    def rehearse(self, rows: int) -> None:
        """The next step's gradients with two microbatches of `rows` at most, as a trial. The caller clears them."""
        batch = {name: tensor[: 2 * rows] for name, tensor in self.batch().items()}
        with torch.random.fork_rng([self.ranks.device] if self.ranks.device.type == "cuda" else []):
            self.gradients(batch, rows)

    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], stop: Callable[[], bool]) -> dict[str, float] | None:
        """The task's metrics over `batches`, as many rows at once as in a step; None when `stop()` says so in between."""
        rows = self.fitting.rows
        found: dict[str, float] | None = self.task.evaluate(
            self.model, batches, ranks=self.ranks, stop=stop, microbatch=rows
        )
        return found

    def account(self) -> dict[str, float]:
        """How steps are done: the rows at once, and what memory strategies moved a step since the last call."""
        steps, self.told = max(self.step - self.told, 1), self.step
        moved = {name: value / steps for name, value in memory.stats(self.model).items()}
        return {"microbatch": self.fitting.rows} | moved

    def clip_gradients(self) -> tuple[Tensor, Tensor]:
        """The global gradient norm (float32 scalar), after which no gradient is longer than `clip` (0: as it is), and what
        this rank alone answers for of the gradients."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.ranks.norm(lambda some: optimizers.total_norm(self.optimizer, some), self.parameters)
        own = self.sums.own if self.sums else self.ranks.own(gradients, norm) if gradients else norm
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        return norm.to(self.ranks.device), own.to(self.ranks.device)

    def seed_row(self, row: int) -> None:
        """Seed what is drawn for this rank's `row`, by its place in the global batch."""
        place = self.ranks.reader * (self.loader.batch // self.ranks.readers) + row
        torch.manual_seed(randomness.mix(self.seed, self.step, place))

    def set_lr(self) -> float:
        """Give every group its peak learning rate times the schedule's factor, and return the first group's."""
        factor = self.schedule.scale(self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor

    def unfit(self, loss: Tensor, norm: Tensor, answer: Tensor) -> Tensor:
        """1.0 where this update must not be made, else 0.0, on the device and the same on all ranks.

        From the first step whose loss or gradient is not finite, or whose loss jumps, nothing changes any more, so that
        all is as it was before it whenever the loop looks. Under an fp16 scaler a gradient may overflow: that update
        alone is left out, and the scaler halves its factor.
        """
        overflow = ~torch.isfinite(norm)
        bad = ~torch.isfinite(loss) if self.scaler.is_enabled() else ~torch.isfinite(loss) | overflow
        bad = bad | self.spikes.judge(loss)
        bad, overflow = self.ranks.anywhere(torch.stack([bad, overflow]).float()) > 0  # replicas may differ
        first = bad & (self.first_bad < 0)
        self.first_bad = torch.where(first, self.step, self.first_bad)
        self.bad_answer = torch.where(first, answer, self.bad_answer)
        good = self.first_bad < 0
        self.spikes.remember(loss, good)
        self.in_a_row = torch.where(good, 0, self.in_a_row)
        return (~good | overflow).float()

    @property
    def position(self) -> int:
        """Which batch of the data's order the next update learns from: the step, but for what is passed over."""
        return position(self.step, self.history)

    def samples(self) -> list[int]:
        """The ids of the samples that the next update learns from, over all ranks."""
        mine = self.batch()["ids"].tolist() if self.ranks.reads else []
        return [sample for rank in self.ranks.host.gather(mine) for sample in rank]

    def start_at(self, step: int) -> None:
        """The next update is that after `step` updates, and nothing bad has been seen."""
        self.step = step
        self.first_bad = torch.full((), -1, device=self.ranks.device)

    def forget_bad(self) -> None:
        """Nothing bad has been seen, and nothing left out."""
        self.start_at(self.step)
        self.bad_answer = torch.zeros(len(ANSWER), dtype=torch.float64, device=self.ranks.device)
        self.in_a_row = torch.zeros((), device=self.ranks.device)

    def failed_at(self) -> int | None:
        """The first step that was bad, if any. Waits for the device."""
        first = int(self.first_bad)
        return None if first < 0 else first

    def leave_out(self) -> bool:
        """Go on behind the next update without making it; False where those would be too many in a row."""
        in_a_row = int(self.in_a_row) + 1
        if in_a_row >= self.guard.skips:
            return False
        self.start_at(self.step + 1)
        self.in_a_row.fill_(in_a_row)
        return True

    @property
    def steps_in_backward(self) -> bool:
        """Whether updates are made before all gradients are there, so that no step can be computed twice."""
        return isinstance(self.optimizer, optimizers.InBackward)

    def torn(self) -> bool:
        """Whether a bad step left some weights updated and others not. Waits for the device."""
        return bool(getattr(self.optimizer, "torn", False))

    def tensors(self) -> dict[str, Tensor]:
        """All that is learned, by name (`model.…`, `optimizer.…`), and the state of every random generator."""
        tensors = {MODEL + k: v for k, v in states.of_model(self.model).items()}
        tensors |= {OPTIMIZER + k: v for k, v in states.of_optimizer(self.model, self.optimizer).items()}
        tensors |= {GUARD + "recent": self.spikes.known(), GUARD + "in_a_row": self.in_a_row}
        return tensors | {RANDOM + k: v for k, v in randomness.state().items()}

    def state(self) -> dict[str, Any]:
        """What else a step depends on, as JSON."""
        rewinds = [rewind.as_json() for rewind in self.history]
        return {"step": self.step, "scaler": precision.scaler_state(self.scaler), "rewinds": rewinds}

    def places(self, described: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        """Where a checkpoint's tensors go, by name: the model's own, and new ones for the rest, in this layout.
        `described` says their dtypes and shapes.

        Raises:
            UserError: they are another model's or another optimizer's.
        """
        shapes = {name: facts["shape"] for name, facts in described.items()}
        states.check_model(self.model, _under(MODEL, shapes))
        own = {MODEL + name: tensor.detach() for name, tensor in states.of_model(self.model).items()}
        facts = {
            name: (shapes[name], DTYPES[of["dtype"]], all(part[2][-1:] == shapes[name][-1:] for part in of["parts"]))
            for name, of in described.items()
        }
        moments = states.places(self.model, self.optimizer, _under(OPTIMIZER, facts))
        rest = {name: described[name] for name in described if name.startswith((RANDOM, GUARD))}
        return own | {OPTIMIZER + k: v for k, v in moments.items()} | on_cpu(rest)

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from where `tensors()` and `state()` were taken, in place.

        Raises:
            UserError: they are another model's or another optimizer's.
        """
        load_model(self.model, tensors)
        states.load_optimizer(self.model, self.optimizer, _under(OPTIMIZER, tensors))
        precision.load_scaler_state(self.scaler, state["scaler"])
        randomness.load(_under(RANDOM, tensors))
        self.forget_bad()
        self.in_a_row = tensors[GUARD + "in_a_row"].to(self.ranks.device)
        self.spikes.load(tensors[GUARD + "recent"])
        self.step = state["step"]
        known = [Rewind(**{**rewind, "samples": tuple(rewind["samples"])}) for rewind in state["rewinds"]]
        self.history = max(known, self.history, key=len)  # what happened after the checkpoint holds as well


def load_model(model: torch.nn.Module, tensors: Mapping[str, Any]) -> None:
    """Copy a checkpoint's `model.…` tensors into `model`, in place.

    Raises:
        UserError: a name or a shape is not the model's.
    """
    states.load_model(model, _under(MODEL, tensors))


def _under(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
