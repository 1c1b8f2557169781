"""A run that guards itself: bad steps are skipped or gone back from, hung ones found, failing saves outlived."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from trainkit import build
from trainkit import run as runs
from trainkit.checkpoint import files
from trainkit.errors import DivergedError
from trainkit.guard import Rewind, pass_over, position
from trainkit.spikes import Spikes
from trainkit.tasks import CausalLM
from trainkit.trainer import Trainer
from trainkit.watchdog import Watchdog

LONG = [*SMALL, "steps=12", "checkpoint.every=2", "checkpoint.keep=9"]
real = CausalLM.backward


def fit(*overrides: str, name: str = "t", folder: Path = Path("runs")) -> Trainer:
    run = runs.composed([*LONG, *overrides, f"name={name}"])
    with build.trainer(run, folder / name) as trainer:
        trainer.fit()
    return trainer


def lines(name: str = "t") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, samples: set[int], factor: float = float("nan")) -> list[list[int]]:
    """Batches with one of these samples have a bad loss. Gives the ids of all batches that were learned from."""
    seen: list[list[int]] = []

    def backward(self: CausalLM, model: Any, batch: Any, **how: Any) -> dict[str, Any]:
        ids = batch["ids"].tolist()
        seen.append(ids)
        metrics = real(self, model, batch, **how)
        if samples & set(ids):
            metrics["loss"] = metrics["loss"] * factor
            for p in model.parameters():
                p.grad.mul_(factor)
        return metrics

    monkeypatch.setattr(CausalLM, "backward", backward)
    return seen


def batches(name: str = "probe") -> list[list[int]]:
    """The ids of the first batches."""
    run = runs.composed([*LONG, f"name={name}"])
    loader = run.data.build(run.data.open(), seed=run.seed, ranks=build.ranks(run), device=torch.device("cpu"))
    return [loader.at(i)["ids"].tolist() for i in range(40)]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.learner.model.parameters()])


def only_in(order: list[list[int]], step: int) -> set[int]:
    """A sample of that batch that no other batch before the end has."""
    others = {i for j, ids in enumerate(order[:30]) if j != step for i in ids}
    free = set(order[step]) - others
    return {min(free)} if free else set()


@pytest.fixture
def order() -> list[list[int]]:
    return batches()


def with_many(place: Path) -> None:
    for i in range(60):
        (place / "corpus" / f"more-{i}.txt").write_text(f"line {i} says {i * i} and then {i**3}. " * 6)


def test_a_bad_step_is_left_out(
    monkeypatch: pytest.MonkeyPatch, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_many(place)
    order = batches()
    poison(monkeypatch, only_in(order, 5))
    done = fit("guard.policy=skip", "tracking=console+jsonl")
    assert torch.isfinite(weights(done)).all()
    assert f"step 6 was left out (samples {order[5]})" in capsys.readouterr().out
    found = lines()
    assert [line["step"] for line in found] == list(range(1, 13))
    assert [line["step"] for line in found if line["loss"] is None] == [6]
    fit("guard.policy=skip", "stop_at=4", name="halted")
    again = fit("guard.policy=skip", name="halted")
    assert torch.equal(weights(again), weights(done))


def test_too_many_bad_steps_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(1000)))
    with pytest.raises(DivergedError, match="step 3: the loss or its gradient is not finite"):
        fit("guard.policy=skip", "guard.skips=3")


def test_going_back_and_past_the_bad_batches(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with_many(place)
    order = batches()
    seen = poison(monkeypatch, only_in(order, 7))
    done = fit("guard.policy=rewind", "guard.pass_over=1", "checkpoint.every=3")
    assert torch.isfinite(weights(done)).all()
    # to the bad one, which is computed twice; back to step 6, whose batch is passed over with the next two
    learned = [*order[:8], order[7], *order[9:15]]
    assert seen == learned
    assert [line["step"] for line in lines()] == list(range(1, 13))
    (event,) = json.loads(Path("runs/t/history.json").read_text())
    assert event == {"bad": 7, "to": 6, "begin": 6, "count": 3, "samples": order[7]}
    seen.clear()
    fit("guard.policy=rewind", "guard.pass_over=1", "checkpoint.every=3", "stop_at=8", name="halted")
    again = fit("guard.policy=rewind", "guard.pass_over=1", "checkpoint.every=3", name="halted")
    assert torch.equal(weights(again), weights(done))
    assert seen == learned


def test_the_history_outlives_a_crash_right_after_it(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with_many(place)
    order = batches()
    poison(monkeypatch, only_in(order, 7))
    done = fit("guard.policy=rewind", "guard.pass_over=1", "checkpoint.every=3")
    monkeypatch.setattr(CausalLM, "backward", real)  # as on other hardware, where the batch would not be bad
    fit("checkpoint.every=3", "stop_at=6", name="other")
    Path("runs/other/history.json").write_bytes(Path("runs/t/history.json").read_bytes())
    again = fit("guard.policy=rewind", "checkpoint.every=3", name="other")
    assert torch.equal(weights(again), weights(done))


def test_a_run_that_goes_bad_again_and_again_stops(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with_many(place)
    poison(monkeypatch, {i for ids in batches()[4:] for i in ids})
    with pytest.raises(DivergedError):
        fit("guard.policy=rewind", "guard.pass_over=0", "guard.rewinds=2")
    assert len(json.loads(Path("runs/t/history.json").read_text())) == 2


def test_positions_pass_over_what_was_bad() -> None:
    history: list[Rewind] = []
    assert [position(step, history) for step in range(4)] == [0, 1, 2, 3]
    history.append(pass_over(bad=5, to=2, around=1, history=history, samples=[]))
    assert [position(step, history) for step in range(8)] == [0, 1, 2, 3, 7, 8, 9, 10]
    history.append(pass_over(bad=3, to=2, around=0, history=history, samples=[]))
    assert [position(step, history) for step in range(6)] == [0, 1, 2, 7, 8, 9]
    history.append(pass_over(bad=3, to=0, around=9, history=history, samples=[]))
    assert [position(step, history) for step in range(3)] == [17, 18, 19]


def test_a_spike_is_what_is_far_above_the_median() -> None:
    torch.manual_seed(0)
    spikes = Spikes(6.0, 64, torch.device("cpu"))
    for step in range(200):
        loss = torch.tensor(5.0 - step / 100 + 0.1 * float(torch.randn(())))
        assert not spikes.judge(loss), step
        spikes.remember(loss, torch.tensor(True))
    assert spikes.judge(torch.tensor(5.0))
    assert not spikes.judge(torch.tensor(3.4))
    known = spikes.known()
    spikes.remember(torch.tensor(torch.nan), torch.tensor(False))
    assert torch.equal(spikes.known(), known)
    other = Spikes(6.0, 32, torch.device("cpu"))
    other.load(known)
    assert torch.equal(other.known(), known[-32:])
    assert not Spikes(6.0, 64, torch.device("cpu")).judge(torch.tensor(1e9))  # nothing is known yet
    assert not Spikes(None, 64, torch.device("cpu")).judge(torch.tensor(1e9))


def test_a_loss_that_jumps_is_a_bad_step(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with_many(place)
    order = batches()
    poison(monkeypatch, only_in(order, 20), factor=50.0)
    fit("steps=24", "guard=skip", "guard.spike=8", "tracking=jsonl")
    assert max(line["loss"] for line in lines()) > 100
    norms = [line["loss"] for line in lines()]
    assert norms[-1] < 10


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_failing_saves_are_outlived_and_then_stop_the_run(
    asynchronous: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [f"checkpoint.asynchronous={asynchronous}", "tracking=console+jsonl"]
    write, fail = files.write, [False]

    def full(path: Path, parts: Any) -> Any:
        if fail[0] and path.parent.name.startswith(".tmp-step"):
            raise OSError(28, "No space left on device")
        return write(path, parts)

    monkeypatch.setattr(files, "write", full)
    step = Trainer.one_step

    def one_step(self: Trainer) -> None:
        fail[0] = 3 <= self.learner.step < 7
        step(self)
        self.checkpointer.wait()

    monkeypatch.setattr(Trainer, "one_step", one_step)
    fit(*how)
    out = capsys.readouterr().out
    assert out.count("could not be saved to runs/t/checkpoints: No space left on device; training goes on") == 2
    assert "saved step 8" in out
    assert sorted(p.name for p in Path("runs/t/checkpoints").iterdir())[0] == "step-0000000002"

    def never(self: Trainer) -> None:
        fail[0] = self.learner.step >= 3
        step(self)
        self.checkpointer.wait()

    monkeypatch.setattr(Trainer, "one_step", never)
    with pytest.raises(RuntimeError, match="step 8 could not be saved"):
        fit(*how, "checkpoint.attempts=3", name="u")
    assert [p.name for p in Path("runs/u/checkpoints").iterdir()] == ["step-0000000002"]


def test_a_hung_step_is_found_and_its_stacks_written(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trainkit.watchdog import Watchdog\n"
        "def hangs(): time.sleep(60)\n"
        "with Watchdog(Path('run'), 0, 1.0) as dog:\n"
        "    for step in range(3): dog.beat(step); time.sleep(0.1)\n"
        "    hangs()\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert time.monotonic() - begin < 30
    assert "rank 0 has been in the step after step 2 for" in done.stderr
    assert "in hangs" in Path("run/stacks-rank-0.txt").read_text()


def test_patience_is_learned_from_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dog = Watchdog(Path(), 0, 1800.0)
    for step in range(30):
        now[0] += 2.0
        dog.beat(step)
    assert dog.limit() == 34.0
    with dog.phase("evaluation"):
        assert dog.limit() == 1800.0
    now[0] += 100
    dog.beat(31)
    assert dog.limit() == 34.0  # an evaluation is no step
    assert Watchdog(Path(), 0, None).limit() == float("inf")


def test_a_suspended_process_is_not_hung() -> None:
    code = (
        "import time; from pathlib import Path; from trainkit import watchdog\n"
        "watchdog.SUSPENDED_S = 2.0\n"
        "with watchdog.Watchdog(Path('run'), 0, 2.0) as dog:\n"
        "    print('go', flush=True)\n"
        "    for step in range(30): dog.beat(step); time.sleep(0.1)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    time.sleep(1.2)
    os.kill(run.pid, signal.SIGSTOP)
    time.sleep(3.5)
    os.kill(run.pid, signal.SIGCONT)
    assert run.wait(30) == 0
    run.stdout.close()


def test_no_save_is_begun_that_cannot_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.one_step

    def asked(self: Trainer) -> None:
        step(self)
        self.saves.longest_s = 100.0
        if self.learner.step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "one_step", asked)
    run = runs.composed([*LONG, "guard.deadline_s=30", "name=t"])
    from trainkit.signals import Signals

    with Signals(lambda note: None) as signals:
        signals.immediate = False
        with build.trainer(run, Path("runs/t"), signals=signals) as trainer:
            assert trainer.fit() == "SIGTERM"
    assert max(p.name for p in Path("runs/t/checkpoints").iterdir()) == "step-0000000004"
