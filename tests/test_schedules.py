"""Schedules against torch's own and against what their names say."""

import itertools
import math

import pytest
import torch

from trainkit.schedules import Schedule

KINDS = ["cosine", "linear", "one_cycle", "wsd", "constant", "inverse_sqrt"]
STEPS = 200


def curve(kind: str, **other: float) -> list[float]:
    schedule = Schedule(**({"kind": kind, "warmup": 20} | other))  # type: ignore[arg-type]
    return [schedule.scale(step, STEPS) for step in range(STEPS + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_up_to_the_peak_and_never_up_again(kind: str, floor: float) -> None:
    found = curve(kind, floor=floor)
    assert 0 < found[0] < 0.1
    assert max(found) == pytest.approx(1.0, abs=0.02)
    assert all(b > a for a, b in itertools.pairwise(found[:20]))
    assert all(b <= a for a, b in itertools.pairwise(found[20:]))
    assert max(abs(b - a) for a, b in itertools.pairwise(found)) < 0.09  # no jump
    ends = {"constant": 1.0, "inverse_sqrt": floor + (1 - floor) * math.sqrt(21 / 201)}
    assert found[-1] == pytest.approx(ends.get(kind, floor), abs=1e-12)
    assert curve(kind, floor=floor, warmup=0)[0] == pytest.approx(1.0)


def torchs(name: str, **other: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **other)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_and_linear_are_torchs() -> None:
    theirs = torchs("CosineAnnealingLR", T_max=STEPS, eta_min=0.1)
    assert curve("cosine", warmup=0, floor=0.1)[:STEPS] == pytest.approx(theirs, abs=1e-9)
    theirs = torchs("LinearLR", start_factor=1.0, end_factor=0.1, total_iters=STEPS)
    assert curve("linear", warmup=0, floor=0.1)[:STEPS] == pytest.approx(theirs, abs=1e-9)


def test_one_cycle_is_torchs() -> None:
    # torch's first value is the starting one, ours has risen once already; its peak is at step 20, ours too
    theirs = torchs("OneCycleLR", max_lr=1.0, total_steps=STEPS + 1, pct_start=21 / (STEPS + 1), final_div_factor=1e9)
    ours = curve("one_cycle", warmup=20)
    assert ours[20:STEPS] == pytest.approx(theirs[20:STEPS], abs=1e-6)
    rising = torchs("OneCycleLR", max_lr=1.0, total_steps=STEPS + 1, pct_start=22 / (STEPS + 1), final_div_factor=1e9)
    assert ours[:20] == pytest.approx(rising[1:21], abs=1e-6)


def test_wsd_is_flat_and_then_a_line() -> None:
    found = curve("wsd", decay=0.25)
    assert set(found[20:151]) == {1.0}
    assert found[150:] == pytest.approx([(STEPS - s) / 50 for s in range(150, STEPS + 1)])


def test_inverse_sqrt_is_one_over_the_root() -> None:
    found = curve("inverse_sqrt")
    assert found[83] / found[20] == pytest.approx(math.sqrt(21 / 84))


def test_a_warmup_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule.warmup=20 leaves nothing of steps=20"):
        Schedule(kind="cosine", warmup=20).check(20)
    Schedule(kind="cosine", warmup=19).check(20)
