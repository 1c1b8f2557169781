"""What learns: a model, its optimizer and a step count. It writes nothing and knows no folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainkit import optimizers, precision, randomness
from trainkit.checkpoint.store import on_cpu
from trainkit.checkpoint.tensors import DTYPES
from trainkit.errors import UserError
from trainkit.exact import ExactSums
from trainkit.guard import Guard, Rewind, position
from trainkit.optimizers.state import load_named_state, named_state
from trainkit.optimizers.state import places as optimizer_places
from trainkit.spikes import Spikes

T = TypeVar("T")
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
    microbatch: int
    guard: Guard = field(default_factory=Guard)
    exact: bool = False  # sums over rows that do not depend on how many ranks share them
    history: list[Rewind] = field(default_factory=list)
    step: int = 0
    first_bad: Tensor = field(init=False)
    skipped: Tensor = field(init=False)
    in_a_row: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]  # the config's word, before any load
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.forget_bad()
        self.spikes = Spikes(self.guard.spike, self.guard.window, self.ranks.device)
        self.sums = ExactSums(self.parameters, self.seed_row, self.ranks.sum) if self.exact else None

    def train_step(self) -> dict[str, Tensor | float]:
        """One update from one global batch. The metrics are tensors: only the loop's log waits for the device."""
        self.ranks.pace.begin()
        batch = self.loader.at(self.position)
        optimizers.begin(self.optimizer, randomness.mix(self.seed, self.step))
        torch.manual_seed(randomness.mix(self.seed, self.step, self.ranks.rank))
        metrics = self.task.backward(
            self.model, batch, microbatch=self.microbatch, ranks=self.ranks, scale=self.scaler.scale, exact=self.sums
        )
        self.scaler.unscale_(self.optimizer)
        metrics["grad_norm"] = self.clip_gradients()
        metrics["lr"] = self.set_lr()
        optimizers.step(self.optimizer, skip=self.unfit(metrics["loss"], metrics["grad_norm"]))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return metrics

    def clip_gradients(self) -> Tensor:
        """The global gradient norm (float32 scalar), after which no gradient is longer than `clip` (0: as it is)."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.ranks.whole(precision.total_norm(gradients))
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        return norm

    def seed_row(self, row: int) -> None:
        """Seed what is drawn for this rank's `row`, by its place in the global batch."""
        place = self.ranks.rank * (self.loader.batch // self.ranks.size) + row
        torch.manual_seed(randomness.mix(self.seed, self.step, place))

    def set_lr(self) -> float:
        """Give every group its peak learning rate times the schedule's factor, and return the first group's."""
        factor = self.schedule.scale(self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor

    def unfit(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where this update must not be made, else 0.0, on the device.

        From the first step whose loss or gradient is not finite, or whose loss jumps, no update is made any more, so
        that the weights are those before it whenever the loop looks. Where the guard skips, that update alone is left
        out, until too many in a row are. Under an fp16 scaler a gradient may overflow: that update alone is left out,
        and the scaler halves its factor.
        """
        overflow = ~torch.isfinite(norm)
        bad = ~torch.isfinite(loss) if self.scaler.is_enabled() else ~torch.isfinite(loss) | overflow
        bad = bad | self.spikes.judge(loss)
        self.spikes.remember(loss, ~bad)
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        self.skipped = torch.where(bad, self.step, self.skipped)
        enough = self.guard.skips if self.guard.policy == "skip" else 1
        self.first_bad = torch.where((self.first_bad < 0) & (self.in_a_row >= enough), self.step, self.first_bad)
        return ((self.first_bad >= 0) | bad | overflow).float()

    @property
    def position(self) -> int:
        """Which batch of the data's order the next update learns from: the step, but for what is passed over."""
        return position(self.step, self.history)

    def forget_bad(self) -> None:
        """Nothing bad has been seen."""
        device = self.ranks.device
        self.first_bad, self.skipped = (torch.full((), -1, device=device) for _ in range(2))
        self.in_a_row = torch.zeros((), device=device)

    def failed_at(self) -> int | None:
        """The first step whose loss or gradient was not finite, if any. Waits for the device."""
        first = int(self.first_bad)
        return None if first < 0 else first

    def skipped_at(self) -> int | None:
        """The last step that was left out, if any. Waits for the device."""
        last = int(self.skipped)
        return None if last < 0 else last

    def tensors(self) -> dict[str, Tensor]:
        """All that is learned, by name (`model.…`, `optimizer.…`), and the state of every random generator."""
        tensors = {MODEL + k: v for k, v in self.model.state_dict().items()}
        tensors |= {OPTIMIZER + k: v for k, v in named_state(self.model, self.optimizer).items()}
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
        check_model(self.model, _under(MODEL, shapes))
        own = {MODEL + name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        dtypes = {name: (shapes[name], DTYPES[facts["dtype"]]) for name, facts in described.items()}
        states = optimizer_places(self.model, _under(OPTIMIZER, dtypes))
        rest = {name: described[name] for name in described if name.startswith((RANDOM, GUARD))}
        return own | {OPTIMIZER + k: v for k, v in states.items()} | on_cpu(rest)

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from where `tensors()` and `state()` were taken, in place.

        Raises:
            UserError: they are another model's or another optimizer's.
        """
        load_model(self.model, tensors)
        load_named_state(self.model, self.optimizer, _under(OPTIMIZER, tensors))
        precision.load_scaler_state(self.scaler, state["scaler"])
        randomness.load(_under(RANDOM, tensors))
        self.forget_bad()
        self.in_a_row = tensors[GUARD + "in_a_row"].to(self.ranks.device)
        self.spikes.load(tensors[GUARD + "recent"])
        self.step = state["step"]
        known = [Rewind(**{**rewind, "samples": tuple(rewind["samples"])}) for rewind in state["rewinds"]]
        self.history = max(known, self.history, key=len)  # what happened after the checkpoint holds as well


def load_model(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's `model.…` tensors into `model`, in place.

    Raises:
        UserError: a name or a shape is not the model's.
    """
    given = _under(MODEL, tensors)
    check_model(model, {name: tensor.shape for name, tensor in given.items()})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if _memory(given[name]) != _memory(tensor):  # else it was read straight into the model
                tensor.copy_(given[name])


def _memory(tensor: Tensor) -> int:
    """Where this rank's part of a tensor lies."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()


def check_model(model: torch.nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError when a name or a shape is not the model's."""
    own = model.state_dict()
    for name in sorted(own.keys() | shapes.keys()):
        if name not in shapes or name not in own:
            where = "lacks" if name not in shapes else "has, and this model lacks,"
            raise UserError(f"the checkpoint is another model's: it {where} the tensor {name}")
        if tuple(shapes[name]) != tuple(own[name].shape):
            raise UserError(
                f"the checkpoint is another model's: {name} is {tuple(shapes[name])} there "
                f"and {tuple(own[name].shape)} here"
            )


def _under(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
