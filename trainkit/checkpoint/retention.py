"""Which checkpoints belong to which tier, and which may go. Pure functions of what the manifests say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PINNED = {"latest", "backup"}  # never removed, however little room there is
CHEAPEST_FIRST = ("rolling", "hours", "epoch", "best")  # what a disk budget takes first


@dataclass(frozen=True)
class Kept:
    """What retention knows of a checkpoint. `metric` is that of an evaluation at this very step; `seconds` are those of
    training up to it, which no change of the clock moves."""

    step: int
    metric: float | None
    epoch_end: bool
    seconds: float = 0.0
    size: int = 0


def tiers(
    saved: Sequence[Kept], *, keep: int, epochs: bool, best: int, higher_is_better: bool, hours: float = 0.0
) -> dict[int, list[str]]:
    """The tiers of every step, in the order latest, backup, best, epoch, hours, rolling.

    `latest` and `backup` are the newest two, `best` the `best` best by metric (NaN is never one, and of equal ones the
    earlier), `epoch` all that end one if `epochs`, `hours` the first of every so many hours of training (0: none),
    `rolling` the newest `keep`. What has no tier may go.
    """
    newest = sorted((k.step for k in saved), reverse=True)
    sign = -1.0 if higher_is_better else 1.0
    measured = [(sign * k.metric, k.step) for k in saved if k.metric is not None and not math.isnan(k.metric)]
    belongs: dict[int, list[str]] = {step: [] for step in newest}
    members = {
        "latest": newest[:1],
        "backup": newest[1:2],
        "best": [step for _, step in sorted(measured)[:best]],
        "epoch": [k.step for k in saved if k.epoch_end and epochs],
        "hours": _first_of_every(hours * 3600, saved),
        "rolling": newest[:keep],
    }
    for tier, steps in members.items():
        for step in steps:
            belongs[step].append(tier)
    return belongs


def _first_of_every(seconds: float, saved: Sequence[Kept]) -> list[int]:
    if seconds <= 0:
        return []
    first: dict[int, int] = {}
    for kept in sorted(saved, key=lambda k: k.step):
        first.setdefault(int(kept.seconds // seconds), kept.step)
    return list(first.values())


def over_budget(saved: Sequence[Kept], belongs: Mapping[int, Sequence[str]], budget: float) -> list[int]:
    """The steps that have to go, besides those without a tier, for the rest to take no more than `budget` bytes: of the
    cheapest tier first, and of one tier the oldest. The newest two stay in any case."""
    left = sum(k.size for k in saved if belongs[k.step])
    gone = []
    candidates = [k for k in saved if belongs[k.step] and not PINNED & set(belongs[k.step])]
    for kept in sorted(candidates, key=lambda k: (max(CHEAPEST_FIRST.index(t) for t in belongs[k.step]), k.step)):
        if left <= budget:
            break
        gone.append(kept.step)
        left -= kept.size
    return gone
