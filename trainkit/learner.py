"""What learns: a model, its optimizer and a step count. It writes nothing and knows no folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainkit import optimizers, precision, randomness
from trainkit.errors import UserError
from trainkit.optimizers.state import load_named_state, named_state

MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.", "random."


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
    step: int = 0
    first_bad: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]  # the config's word, before any load
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.first_bad = torch.full((), -1.0, device=self.ranks.device)

    def train_step(self) -> dict[str, Tensor | float]:
        """One update from one global batch. The metrics are tensors: only the loop's log waits for the device."""
        batch = self.loader.at(self.step)
        torch.manual_seed(randomness.mix(self.seed, self.step, self.ranks.rank))
        metrics = self.task.backward(
            self.model, batch, microbatch=self.microbatch, ranks=self.ranks, scale=self.scaler.scale
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
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        return norm

    def set_lr(self) -> float:
        """Give every group its peak learning rate times the schedule's factor, and return the first group's."""
        factor = self.schedule.scale(self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor

    def unfit(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where this update must not be made, else 0.0, on the device.

        From the first step whose loss or gradient is not finite no update is made any more, so that the weights are
        those before it whenever the loop looks. Under an fp16 scaler a gradient may overflow: that update alone is
        left out, and the scaler halves its factor.
        """
        overflow = ~torch.isfinite(norm)
        bad = ~torch.isfinite(loss) if self.scaler.is_enabled() else ~torch.isfinite(loss) | overflow
        self.first_bad = torch.where((self.first_bad < 0) & bad, self.step, self.first_bad)
        return ((self.first_bad >= 0) | overflow).float()

    def failed_at(self) -> int | None:
        """The first step whose loss or gradient was not finite, if any. Waits for the device."""
        first = int(self.first_bad)
        return None if first < 0 else first

    def tensors(self) -> dict[str, Tensor]:
        """All that is learned, by name (`model.…`, `optimizer.…`), and the state of every random generator."""
        tensors = {MODEL + k: v for k, v in self.model.state_dict().items()}
        tensors |= {OPTIMIZER + k: v for k, v in named_state(self.model, self.optimizer).items()}
        return tensors | {RANDOM + k: v for k, v in randomness.state().items()}

    def state(self) -> dict[str, Any]:
        """What else a step depends on, as JSON."""
        return {"step": self.step, "scaler": precision.scaler_state(self.scaler)}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from where `tensors()` and `state()` were taken, in place.

        Raises:
            UserError: they are another model's or another optimizer's.
        """
        load_model(self.model, tensors)
        load_named_state(self.model, self.optimizer, _under(OPTIMIZER, tensors))
        precision.load_scaler_state(self.scaler, state["scaler"])
        randomness.load(_under(RANDOM, tensors))
        self.step = state["step"]


def load_model(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's `model.…` tensors into `model`, in place.

    Raises:
        UserError: a name or a shape is not the model's.
    """
    given, own = _under(MODEL, tensors), model.state_dict()
    for name in sorted(own.keys() | given.keys()):
        if name not in given or name not in own:
            where = "lacks" if name not in given else "has, and this model lacks,"
            raise UserError(f"the checkpoint is another model's: it {where} the tensor {name}")
        if given[name].shape != own[name].shape:
            raise UserError(
                f"the checkpoint is another model's: {name} is {tuple(given[name].shape)} there "
                f"and {tuple(own[name].shape)} here"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
