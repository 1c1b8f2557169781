"""What a run does when something goes wrong in it: a loss that is not finite or jumps, a step that never ends, a machine
that is taken away."""

from dataclasses import dataclass
from typing import Any, Literal

from trainkit.config import Count, Natural, NonNegative, Positive, config


@config
class Guard:
    """`policy` at a loss or gradient that is not finite, or (with `spike`) at a loss that lies more than `spike` robust
    standard deviations above the median of the last `window`: `stop`, `skip` (the update is not made), `rewind` (go back
    to the last checkpoint and pass over the batches from `pass_over` before the bad one to `pass_over` after it).

    With `replay` a bad step is computed again first: where the answer is another one it is the machine's fault, and the
    step is done again. With `check_every` each so-many-th step is computed twice, bad or not (null: none).

    `skips` in a row, or `rewinds` in all, are the most before the run stops. A step that takes longer than `hang_s`
    seconds at first, and later than twice the slowest percent plus 30, is taken for hung (null: never). `notice` is a
    file or an http(s) address that tells that this machine is about to be taken away; `deadline_s` is how long after a
    stop signal it still is there (null: as long as it takes).
    """

    policy: Literal["stop", "skip", "rewind"] = "stop"
    spike: Positive | None = None
    window: Count = 128
    replay: bool = True
    check_every: Count | None = None
    pass_over: Natural = 8
    skips: Count = 3
    rewinds: Natural = 3
    hang_s: Positive | None = 1800.0
    notice: str | None = None
    deadline_s: NonNegative | None = None


@dataclass(frozen=True)
class Rewind:
    """The run went back from `bad` to `to`; data positions from `begin`, `count` of them, are passed over ever since."""

    bad: int
    to: int
    begin: int
    count: int
    samples: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """For the run's history."""
        return {**self.__dict__, "samples": list(self.samples)}


def position(step: int, history: list[Rewind]) -> int:
    """Which batch of the endless order the update after `step` updates learns from."""
    place, passed = step, 0
    for rewind in sorted(history, key=lambda r: r.begin):
        begin, end = max(rewind.begin, passed), rewind.begin + rewind.count
        if place >= begin and end > begin:  # what two rewinds both pass over counts once
            place += end - begin
            passed = end
    return place


def pass_over(bad: int, to: int, around: int, history: list[Rewind], samples: list[int]) -> Rewind:
    """Going back from the bad step `bad` to the checkpoint `to`: which positions to pass over from now on."""
    begin = max(position(to, history), position(bad, history) - around)
    return Rewind(bad, to, begin, position(bad, history) + around + 1 - begin, tuple(samples))
