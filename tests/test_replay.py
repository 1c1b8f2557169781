"""Is it the machine or the data? Faults of either kind at any step: what is learned is what it should be."""

import signal
from pathlib import Path

import pytest
import torch

from tests.faults import TWENTY, Fault, bad_data, equal, fit, machine, order, said
from tests.test_guard import only_in
from trainkit import launch
from trainkit.checkpoint import find
from trainkit.cli import main
from trainkit.errors import DivergedError, UnreliableError
from trainkit.fingerprint import fingerprint
from trainkit.replay import Answer
from trainkit.signals import Signals
from trainkit.trainer import Trainer

WAYS = {
    "stop": (20, ["model.dropout=0.1"]),
    "rewind": (20, ["memory.microbatch=1", "guard=rewind"]),
    "skip": (20, ["optimizer=muon", "guard=skip", "memory=checkpoint"]),
    "elastic": (20, ["deterministic=elastic", "model.dropout=0.1"]),
    "workers": (7, ["data.workers=1"]),
    "fp16": (3, ["precision=fp16", "guard=skip", "data.length=8", "data.batch=1"]),
}
FAULTS = [
    Fault(0, "forward", "nan"),
    Fault(2, "forward", "inf"),
    Fault(5, "backward", "inf"),
    Fault(6, "forward", "inf"),
    Fault(9, "summed", "nan"),
    Fault(18, "forward", "large"),
    Fault(19, "summed", "inf"),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_machines_fault_costs_nothing(way: str) -> None:
    steps, how = WAYS[way]
    what = [*how, f"steps={steps}", "guard.spike=8"]
    ours = [f for f in FAULTS if f.step < steps and (f.where == "forward" or way != "fp16")]  # there it may overflow
    clean = fit("clean", *what)
    faulty = fit("faulty", *what, faults=tuple(ours))
    equal("faulty", "clean")
    assert faulty.learner.state() == clean.learner.state()
    lines, at = said("faulty"), [fault.step for fault in ours]
    assert [int(line.split("step ")[1].split(",")[0]) for line in lines] == [step + 1 for step in at]
    assert all("a fault of the machine at rank 0 (" in line for line in lines)
    assert all("not of the data; what two agree on is taken" in line for line in lines)
    assert not Path("runs/faulty/history.json").exists()
    assert faulty.computed == sorted([*range(steps), *at, *at])  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
@pytest.mark.parametrize("step", [7, 12])
def test_bad_data_are_told_from_a_bad_machine(policy: str, step: int, place: Path) -> None:
    what = [f"guard.policy={policy}", "guard.pass_over=1", "steps=40", "optimizer.lr=1e-3", "checkpoint.every=6"]
    samples = only_in(order(place), step)
    clean = fit("clean", *what)
    with bad_data(samples):
        if policy == "stop":
            with pytest.raises(DivergedError, match=f"step {step + 1}: .*those samples"):
                fit("bad", *what)
            before = fit("before", *what, f"stop_at={step}")
            equal("bad", "before", logs=False)
        else:
            bad = fit("bad", *what)
            fit("unreplayed", *what, "guard.replay=false")
            equal("bad", "unreplayed")  # computing it again left nothing behind
            assert bad.best.value == pytest.approx(clean.best.value, rel=0.01)
            assert len(bad.learner.history) == int(policy == "rewind")
            before = bad
    assert all(torch.isfinite(p).all() for p in before.learner.parameters)
    (line,) = said("bad")
    assert f"step {step + 1}, computed again, gives the same (loss nan" in line
    assert "the data or the model, not the machine" in line


def test_two_of_three_decide(place: Path) -> None:
    samples, what = only_in(order(place), 7), ["guard.policy=skip"]
    with bad_data(samples):
        fit("bad", *what)
        fit("both", *what, faults=(Fault(7, "backward", "large", tries=(1,)),))
        fit("spoiled", *what, faults=(Fault(7, "backward", "large"),))
    for name in ("both", "spoiled"):
        equal(name, "bad")
        assert "a fault of the machine at rank 0" in said(name)[0]
    assert sum("step 8 was left out" in line for line in Path("runs/both/notes").read_text().splitlines()) == 1


def test_a_machine_that_never_agrees_with_itself_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit("before", "stop_at=6")
    faults = (
        Fault(6, "forward", "nan", tries=(0,)),
        Fault(6, "backward", "large", tries=(1,)),
        Fault(6, "backward", "inf", tries=(2,)),
    )
    with pytest.raises(SystemExit) as left, machine(*faults):
        main(["train", *TWENTY, "name=never"])
    assert left.value.code == 70
    line = capsys.readouterr().err
    assert line.startswith(
        "trainkit: step 7, computed three times, gave three answers (loss nan, gradient norm nan; loss"
    )
    assert "at rank 0 (" in line
    assert line.count("\n") == 1
    equal("never", "before", logs=False)
    fit("never")  # on another machine
    fit("clean")
    equal("never", "clean")


def test_without_replay_nothing_is_computed_twice() -> None:
    with pytest.raises(DivergedError), machine(Fault(6)) as computed:
        fit("off", "guard.replay=false")
    assert computed == list(range(7))


@pytest.fixture
def looks_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the loop looks only when it logs or saves."""
    monkeypatch.setattr(Trainer, "looks_always", False)


LATE = ["tracking.every=5", "checkpoint.every=10", "guard.spike=8"]


@pytest.mark.usefixtures("looks_late")
def test_a_loop_that_looks_late_goes_on_from_the_right_step() -> None:
    fit("clean", *LATE)
    faulty = fit("faulty", *LATE, faults=(Fault(2), Fault(6, "backward", "nan"), Fault(17, "forward", "large")))
    equal("faulty", "clean")
    again = [*range(3), 3, 4, 2, 2, *range(3, 7), *range(7, 10), 6, 6, *range(7, 18), 18, 19, 17, 17, 18, 19]
    assert faulty.computed == again  # type: ignore[attr-defined]


@pytest.mark.usefixtures("looks_late")
@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_looking_late_learns_the_same(policy: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, what = only_in(order(place), 12), [*LATE, f"guard.policy={policy}", "guard.pass_over=1"]
    with bad_data(samples):
        fit("late", *what)
        monkeypatch.setattr(Trainer, "looks_always", True)
        fit("at-once", *what)
    equal("late", "at-once")
    assert ["not the machine" in line for line in said("late")] == [True]


@pytest.mark.usefixtures("looks_late")
@pytest.mark.parametrize("kind", ["machine", "data"])
def test_a_stop_before_the_loop_looked_saves_no_step_that_made_no_update(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = only_in(order(place), 6)
    step = Trainer.one_step

    def asked(self: Trainer) -> None:
        step(self)
        if self.learner.step == 8:
            signal.raise_signal(signal.SIGTERM)

    fit("clean", *LATE, "stop_at=7")
    monkeypatch.setattr(Trainer, "one_step", asked)
    with Signals(lambda note: None) as signals:
        signals.immediate = False
        if kind == "machine":
            fit("stopped", *LATE, faults=(Fault(6),), signals=signals)
        else:
            with bad_data(samples), pytest.raises(DivergedError):
                fit("stopped", *LATE, signals=signals)
    done = 7 if kind == "machine" else 6
    assert find.resolve("stopped", Path("runs"), launch.policy).name == f"step-{done:010}"
    if kind == "machine":
        equal("stopped", "clean", logs=False)


def test_a_step_is_checked_every_so_often() -> None:
    what = ["guard.check_every=5", "data.workers=1"]
    slight = Fault(9, "summed", "slight")
    clean = fit("clean", *what)
    assert clean.computed == sorted([*range(20), 4, 9, 14, 19])  # type: ignore[attr-defined]
    fit("unchecked", faults=(slight,))
    fit("checked", *what, faults=(slight, Fault(14, "backward", "slight", tries=(1,))))
    equal("checked", "clean")
    with pytest.raises(AssertionError):
        equal("unchecked", "clean")
    assert said("unchecked") == []  # it raises no alarm
    assert [line.split(",")[0] for line in said("checked")] == ["warning: step 10", "warning: step 15"]


def test_a_check_that_never_agrees_stops_the_run() -> None:
    fit("before", "stop_at=4")
    faults = (Fault(4, "summed", "slight", tries=(0,)), Fault(4, "summed", "large", tries=(1,)))
    with pytest.raises(UnreliableError, match="step 5, computed three times"):
        fit("never", "guard.check_every=5", faults=(*faults, Fault(4, "backward", "slight", tries=(2,))))
    equal("never", "before", logs=False)


def test_answers_are_compared_to_the_bit_or_to_a_tolerance() -> None:
    nan, inf = float("nan"), float("inf")
    one = Answer((1.0, 2.0, 3.0, 4.0), bits=5)
    near = Answer((1.0 + 1e-9, 2.0, 3.0, 4.0))
    assert one.differs(one, exact=True) == (False, False, False)
    assert one.differs(near, exact=True) == (False, False, True)
    assert one.differs(near, exact=False) == (False, False, False)
    assert one.differs(Answer(one.numbers, bits=6), exact=True) == (False, False, True)
    assert one.differs(Answer(one.numbers, bits=6), exact=False) == (False, False, False)
    assert one.differs(Answer(one.numbers), exact=True) == (False, False, False)
    assert one.differs(Answer((1.0, 2.0, 3.1, 4.0)), exact=False) == (True, False, True)
    assert one.differs(Answer((1.0, 2.0, 3.0, nan)), exact=False) == (False, True, True)
    bad = Answer((nan, inf, 3.0, 4.0))
    assert bad.differs(bad, exact=True) == (False, False, False)
    assert bad.differs(Answer((inf, nan, 3.0, 4.0)), exact=True)[2]
    assert not bad.differs(Answer((inf, nan, 3.0, 4.0)), exact=False)[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_any_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(8).mul(1e6).to(dtype)
    numbers, other = whole[1:], torch.zeros(3, 2)
    print_of = {float(fingerprint([numbers, other]))}
    as_bytes = numbers.view(torch.uint8)
    for i in range(len(as_bytes)):
        for bit in range(8):
            as_bytes[i] ^= 1 << bit
            print_of.add(float(fingerprint([numbers, other])))
            as_bytes[i] ^= 1 << bit
    assert len(print_of) > 7 * 8  # of bits of the same place some may look alike, but none like none
    assert float(fingerprint([numbers, other])) == float(fingerprint([numbers.clone(), other]))
