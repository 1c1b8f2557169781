"""Is it the machine or the data? A step that went wrong is computed again, from the same weights, batch and seeds.

The same answer speaks of the data or the model. Another one speaks of a processor, a memory or a link that computed
wrongly and did not say so (silent data corruption: Dixit et al. 2021, arXiv:2102.11245); then a third computation
decides, and what two agree on is taken. What is wrong in the weights themselves is wrong each time: it looks like data.
"""

import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.errors import UnreliableError
from trainkit.fingerprint import fingerprint
from trainkit.learner import ANSWER, Learner
from trainkit.watchdog import Watchdog

TOLERANCE = 1e-2  # relative, where arithmetic is not the same each time: sums on a GPU may take any order


@dataclass(frozen=True)
class Answer:
    """What a computation of a step gave on this rank: the numbers of `learner.ANSWER`, and that of the gradients' bits
    where it was taken."""

    numbers: tuple[float, ...]
    bits: float | None = None

    def differs(self, other: "Answer", *, exact: bool) -> tuple[bool, bool, bool]:
        """Whether this rank's own loss, its own gradients, or anything at all is another in `other`."""
        same = [_same(a, b, exact=exact) for a, b in zip(self.numbers, other.numbers, strict=True)]
        bits = exact and None not in (self.bits, other.bits) and self.bits != other.bits
        whole = not all(same) or bits
        return not same[ANSWER.index("own_loss")], not same[ANSWER.index("own_gradients")], whole


class Replay:
    """Computes steps of `learner` again. All ranks call the same methods at the same step; `say` is told of a machine's
    fault, `note` of what is none."""

    def __init__(
        self, learner: Learner, watchdog: Watchdog, note: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self._learner, self._watchdog, self._note, self._say = learner, watchdog, note, say
        self._exact = learner.ranks.device.type == "cpu"

    def again(self, metrics: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """Compute the bad step that the learner stands before once more: its metrics, and whether it is made by now. Where
        the machine was wrong that is done with what two computations agree on; where it is bad indeed it is not.

        Raises:
            UnreliableError: three computations gave three answers.
        """
        learner, bad = self._learner, self._learner.step
        with self._watchdog.phase("step that is computed again"):
            first = Answer(tuple(learner.bad_answer.tolist()))
            _, second = self._compute(learner.batch())
            if blamed := self._blamed(first, second):
                third = self._third(first, second, blamed)
                learner.start_at(bad)
                metrics = learner.update(third)
                made = learner.failed_at() is None
                learner.step = bad + int(made)
                return metrics, made
            learner.discard()
        self._note(
            f"step {bad + 1}, computed again, gives the same ({_shown(second)}): it is the data or the model, not the machine"
        )
        return metrics, False

    def train_step(self) -> dict[str, Any]:
        """A step and its metrics. Each `guard.check_every`-th is computed twice before it is made.

        Raises:
            UnreliableError: three computations gave three answers.
        """
        learner, every = self._learner, self._learner.guard.check_every
        if every is None or (learner.step + 1) % every:
            return learner.train_step()
        with self._watchdog.phase("step that is computed twice"):
            batch = learner.batch()
            _, first = self._compute(batch)
            learner.discard()
            metrics, second = self._compute(batch)
            if blamed := self._blamed(first, second):
                metrics = self._third(first, second, blamed)
            return learner.update(metrics)

    def _third(self, first: Answer, second: Answer, blamed: list[str]) -> dict[str, Tensor]:
        """The metrics of a third computation, whose gradients are left in the parameters, if it agrees with one of two."""
        learner = self._learner
        learner.discard()
        metrics, third = self._compute(learner.batch())
        answers = "; ".join(_shown(answer) for answer in (first, second, third))
        where = f"a fault of the machine at {' or '.join(blamed)}, not of the data"
        if self._blamed(second, third) and self._blamed(first, third):
            learner.discard()
            raise UnreliableError(
                f"step {learner.step + 1}, computed three times, gave three answers ({answers}): {where}; the weights "
                f"before it are saved as step {learner.step}; go on with another machine"
            )
        self._say(
            f"warning: step {learner.step + 1}, computed again, gave another answer ({answers}): {where}; what two "
            f"agree on is taken"
        )
        return metrics

    def _compute(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Answer]:
        learner = self._learner
        metrics = learner.compute(batch)
        numbers = torch.stack([metrics[name].detach().double() for name in ANSWER]).tolist()
        gradients = [p.grad for p in learner.parameters if p.grad is not None]
        bits = float(fingerprint(gradients)) if self._exact else None
        return metrics, Answer(tuple(numbers), bits)

    def _blamed(self, one: Answer, other: Answer) -> list[str]:
        """The ranks whose answers differ, none where all agree: those whose own loss does, else whose own gradients do,
        before the ranks' are summed, else whose sums do."""
        ranks = self._learner.ranks
        mine = f"rank {ranks.rank} ({socket.gethostname()}, {ranks.device})"
        said = ranks.host.gather([mine, *one.differs(other, exact=self._exact)])
        for column in (1, 2, 3):
            if blamed := [its[0] for its in said if its[column]]:
                return blamed
        return []


def _shown(answer: Answer) -> str:
    return f"loss {answer.numbers[0]:g}, gradient norm {answer.numbers[1]:g}"


def _same(a: float, b: float, *, exact: bool) -> bool:
    if exact:
        return a == b or (math.isnan(a) and math.isnan(b))
    if not math.isfinite(a) or not math.isfinite(b):
        return math.isfinite(a) == math.isfinite(b)
    return math.isclose(a, b, rel_tol=TOLERANCE)
