"""Which checkpoints belong to which tier, and which may go. Pure functions of what the manifests say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What retention knows of a checkpoint. `metric` is that of an evaluation at this very step."""

    step: int
    metric: float | None
    epoch_end: bool


def tiers(saved: Sequence[Kept], *, keep: int, epochs: bool, best: int, higher_is_better: bool) -> dict[int, list[str]]:
    """The tiers of every step, in the order latest, backup, best, epoch, rolling.

    `latest` and `backup` are the newest two, `best` the `best` best by metric (NaN is never one, and of equal ones the
    earlier), `epoch` all that end one if `epochs`, `rolling` the newest `keep`. What has no tier may go.
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
        "rolling": newest[:keep],
    }
    for tier, steps in members.items():
        for step in steps:
            belongs[step].append(tier)
    return belongs
