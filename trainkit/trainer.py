"""The loop around a learner: when to log, to evaluate, to save and to stop."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainkit.checkpoint import SaveFailed
from trainkit.errors import DivergedError, UnreliableError
from trainkit.evaluation import Best
from trainkit.guard import Guard, Rewind, pass_over, position
from trainkit.learner import Learner
from trainkit.profile import Profiler
from trainkit.replay import Replay
from trainkit.saves import Saves
from trainkit.signals import Signals
from trainkit.throughput import Meter
from trainkit.watchdog import Watchdog

NOTHING, SAVE, STOP, GIVE_UP = range(4)  # what a rank may want at a step; all do what the most urgent one wants


@dataclass
class Trainer:
    """A learner, and what a run does around it.

    `facts` are what a checkpoint has to agree with and the loop does not know (the data's fingerprint, the tokenizer);
    `files` are carried into every checkpoint so that it can be used alone; `sample` writes some text with the model;
    `remember` makes the run's history durable; `tell` sends a message to a person who does not watch.
    """

    learner: Learner
    checkpointer: Any
    checkpoint: Any
    trackers: Any
    evaluation: Any
    guard: Guard
    signals: Signals
    watchdog: Watchdog
    meter: Meter
    log_every: int
    stop_at: int
    readings: Callable[[], Mapping[str, float]]  # of the device
    sample: Callable[[], str] | None
    remember: Callable[[list[Rewind]], None]
    tell: Callable[[str], None]
    facts: Mapping[str, Any]
    files: Mapping[str, bytes]
    best: Best
    evaluated: tuple[int, dict[str, float]] = (-1, {})  # the step of the last evaluation, and what it found
    profiler: Profiler = field(default_factory=Profiler)
    status: str = "failed"  # until `fit` knows better

    def __post_init__(self) -> None:
        self.saves = Saves(self.checkpointer, self.trackers.note, self.tell)
        self.replay = Replay(self.learner, self.watchdog, self.trackers.note, self.warn)

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's content, in place."""
        self.learner.load(tensors, state["learner"])
        self.best.load_state_dict(state["best"])
        self.meter.seconds = state["seconds"]
        self.saves.last = self.learner.step
        self.evaluated = (-1, {})

    def fit(self) -> str:
        """Train until the end, and say which end it was: `done`, `patience` or what asked to stop.

        Raises:
            DivergedError, UnreliableError: the guard gave up at a step; a checkpoint from before it is saved.
            SaveFailed: checkpoints cannot be saved any more.
        """
        with self.watchdog:
            self.meter.start(self.learner.step)
            try:
                while (end := self.end()) is None:
                    self.one_step()
                    if self.signals.immediate:
                        self.signals.immediate = False
                        self.checkpointer.make_room(self.learner.tensors())
                    self.watchdog.beat(self.learner.step)
            except (DivergedError, UnreliableError):
                if not self.learner.torn():
                    self.learner.forget_bad()
                    self.save(wait=True)
                raise
            self.leave(end)
        self.status = end
        return end

    def end(self) -> str | None:
        """Why the loop should stop here, if it should. All ranks stop, or save, at the same step."""
        self.saves.hear()
        wish = self.learner.ranks.host.max(self.wish())
        if wish == GIVE_UP:
            raise self.saves.failed[-1] if self.saves.failed else SaveFailed("another rank could not save")
        if wish != NOTHING:
            self.look({})  # no step is saved that made no update
        if wish == STOP:
            return self.signals.asked or "a signal to another rank"
        if wish == SAVE:
            self.signals.save_asked = False
            self.save()
        if self.learner.step >= self.stop_at:
            return "done"
        return "patience" if self.best.exhausted(self.evaluation.patience) else None

    def wish(self) -> int:
        if len(self.saves.failed) >= self.checkpoint.attempts:
            return GIVE_UP
        return STOP if self.signals.asked else SAVE if self.signals.save_asked else NOTHING

    def leave(self, end: str) -> None:
        """The last save, unless this machine will be gone before it is done."""
        deadline, since = self.guard.deadline_s, self.signals.since
        late = (
            end not in ("done", "patience")
            and deadline is not None
            and self.saves.too_late(deadline - (time.monotonic() - since))
        )
        if self.learner.ranks.host.max(int(late)):
            self.trackers.note(
                f"a save takes {self.saves.longest_s:.0f} s, which is more than is left: step {self.saves.last} is the last"
            )
            return
        self.save(wait=True)

    def one_step(self) -> None:
        with self.profiler.step(self.learner.step + 1):
            metrics: Mapping[str, Any] = self.replay.train_step()
        step = self.learner.step
        last = step == self.stop_at
        epoch_end = int(self.epoch(step)) > int(self.epoch(step - 1))
        evaluate = last or self.evaluation.due(step)
        log = last or evaluate or step % self.log_every == 0
        save = last or self.checkpoint.due(step, epoch_end=epoch_end)
        if log or save or self.looks_always:
            metrics = self.look(metrics)
            if self.learner.step != step:
                return
        record = self.read(metrics) if log else {}
        if evaluate and (found := self.evaluate()):
            record |= found
            value = found.get(self.evaluation.metric, math.nan)
            improved = self.counts(step) and self.best.update(step, value)
            save = save or (improved and self.checkpoint.keep_best > 0)
            if improved:
                self.tell(f"step {step}: {self.evaluation.metric} {value:.4f}, the best so far")
        if log:
            self.trackers.log(step, record)
        if save:
            self.save(epoch_end=epoch_end)

    @property
    def looks_always(self) -> bool:
        """Whether every step is looked at: elsewhere that would wait for the device."""
        return self.learner.ranks.device.type == "cpu"

    def epoch(self, step: int) -> float:
        """How often all samples were seen by then."""
        return self.learner.loader.epoch(position(step, self.learner.history))

    def counts(self, step: int) -> bool:
        """Whether an evaluation here is one that an undisturbed run makes: where a run stops must not decide more."""
        return self.evaluation.due(step) or step == self.learner.steps

    def read(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The step's metrics as numbers: the only place that waits for the device."""
        step = self.learner.step
        record = {name: float(value) for name, value in metrics.items()} | {"epoch": self.epoch(step)}
        if slow := self.learner.ranks.straggler():
            self.trackers.note(f"warning: {slow}")
        record |= self.meter.read(step, self.stop_at) | dict(self.readings())
        return record | self.learner.account() | self.saves.take_metrics()

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """What happens inside is not training."""
        with self.meter.pause(), self.watchdog.phase(phase), self.profiler.phase(phase):
            yield

    def evaluate(self) -> dict[str, float] | None:
        """The validation split's metrics and a sample of text; None when a signal cut the evaluation short."""
        learner = self.learner
        with self.aside("evaluation"):
            batches = learner.loader.validation(self.evaluation.batches)
            found = learner.evaluate(batches, lambda: self.signals.asked is not None)
            if found is None:
                return None
            if self.sample:
                self.trackers.text(learner.step, "sample", self.sample())
        self.evaluated = (learner.step, found)
        return found

    def save(self, *, epoch_end: bool = False, wait: bool = False) -> None:
        """Save this step, once. One that fails warns and leaves it to the next one; with `wait` there will be none.

        Raises:
            SaveFailed: with `wait` only.
        """
        step = self.learner.step
        with self.aside("save"):
            if self.saves.last != step:
                facts = self.facts_of(step, epoch_end)
                self.checkpointer.save(step, self.learner.tensors(), self.state(), self.files, facts=facts, wait=wait)
                self.saves.last = step
            elif wait:
                self.checkpointer.wait()
        self.saves.hear()
        if wait and self.saves.failed:
            raise self.saves.failed[-1]

    def facts_of(self, step: int, epoch_end: bool) -> dict[str, Any]:
        """What is said of a checkpoint without opening it. The metric is that of an evaluation at this very step."""
        found = self.evaluated[1] if self.evaluated[0] == step else {}
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        return {
            "metric": finite.get(self.evaluation.metric) if self.counts(step) else None,
            "val_loss": finite.get("val_loss"),
            "epoch": self.epoch(step),
            "epoch_end": epoch_end,
            "tokens": step * self.meter.tokens_per_step,
            "seconds": self.meter.seconds,
        }

    def state(self) -> dict[str, Any]:
        """What a run goes on from beside the tensors, as JSON."""
        return {
            "learner": self.learner.state(),
            "best": self.best.state_dict(),
            "seconds": self.meter.seconds,
            **self.facts,
        }

    def look(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """Where a step went wrong, do what the guard says. The loop goes on from the learner's step, which may be another
        by now; `metrics` are those of the step before it, as they are by now.

        Raises:
            DivergedError: the guard says to stop, or has no other way left.
            UnreliableError: every computation of the step gave another answer.
        """
        learner, bad = self.learner, self.learner.failed_at()
        if bad is None:
            return metrics
        learner.step = bad
        if self.guard.replay and not learner.steps_in_backward:
            metrics, made = self.replay.again(metrics)
            if made:
                return metrics
        samples = learner.samples()
        if self.guard.policy == "skip" and learner.leave_out():
            self.trackers.note(f"warning: step {bad + 1} was left out (samples {samples})")
            return metrics
        if self.guard.policy == "rewind" and len(learner.history) < self.guard.rewinds and self.rewind(bad, samples):
            return metrics
        left = f"the weights before it are saved as step {bad}"
        if learner.torn():
            left = "only some weights made it, so that none are saved: go on from the newest checkpoint"
        raise DivergedError(
            f"step {bad + 1}: the loss or its gradient is not finite or jumped (batch of samples {samples}); {left}; "
            f"lower optimizer.lr, raise schedule.warmup, or look at those samples"
        )

    def warn(self, text: str) -> None:
        """Tell whoever watches, and whoever does not."""
        self.trackers.note(text)
        self.tell(text)

    def rewind(self, bad: int, samples: list[int]) -> bool:
        """Go back to the newest good checkpoint and pass over the batches around the bad one; False where there is none."""
        with self.aside("rewind"):
            self.checkpointer.wait()
            self.saves.hear()
            found = self.checkpointer.load_latest(self.learner.places)
            if found is None:
                return False
            event = pass_over(bad, found.step, self.guard.pass_over, self.learner.history, samples)
            self.learner.history.append(event)
            self.remember(self.learner.history)
            self.restore(found.tensors, found.state)
        self.trackers.go_back(found.step)
        self.meter.start(found.step)
        self.warn(
            f"warning: step {bad + 1} went wrong (samples {samples}): back to step {found.step}, and past "
            f"{event.count} batches from {event.begin} on"
        )
        return True
