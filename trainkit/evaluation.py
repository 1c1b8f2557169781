"""When to evaluate, which evaluation is the best so far, and when patience is at its end."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainkit.config import Count, Natural, NonNegative, config


@config
class Evaluation:
    """`every` 0 evaluates at the end only; `batches` null takes the whole validation split; `patience` is how many
    evaluations without an improvement of at least `min_delta` end the run; `sample_tokens` 0 writes no sample."""

    every: Natural = 100
    batches: Count | None = None
    metric: str = "val_loss"
    higher_is_better: bool = False
    patience: Count | None = None
    min_delta: NonNegative = 0.0
    sample_tokens: Natural = 200
    prompt: str = "\n"

    def due(self, step: int) -> bool:
        """Whether an undisturbed run evaluates after `step` updates."""
        return self.every > 0 and step % self.every == 0

    def best(self) -> "Best":
        """Nothing seen yet."""
        return Best(higher=self.higher_is_better, min_delta=self.min_delta)


@dataclass
class Best:
    """The best value so far and how many values ago it was. NaN is never the best."""

    higher: bool = False
    min_delta: float = 0.0
    value: float | None = None
    step: int | None = None
    stale: int = 0

    def update(self, step: int, value: float) -> bool:
        """Take a new value in, and say whether it is the best."""
        gain = 0.0 if self.value is None else (value - self.value if self.higher else self.value - value)
        better = not math.isnan(value) and (self.value is None or (gain > 0 and gain >= self.min_delta))
        if better:
            self.value, self.step, self.stale = value, step, 0
        else:
            self.stale += 1
        return better

    def exhausted(self, patience: int | None) -> bool:
        """Whether the best is `patience` values old."""
        return patience is not None and self.stale >= patience

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as JSON; what the config knows is not in it."""
        return {key: value for key, value in asdict(self).items() if key in ("value", "step", "stale")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.value, self.step, self.stale = state["value"], state["step"], state["stale"]
