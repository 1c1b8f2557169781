"""The loop around a learner: when to log, to evaluate, to save and to stop."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.checkpoint import SaveFailed
from trainkit.errors import DivergedError
from trainkit.evaluation import Best
from trainkit.learner import Learner
from trainkit.signals import Signals
from trainkit.throughput import Meter

SAVE_ATTEMPTS = 3  # saves in a row that may fail before the run stops


@dataclass
class Trainer:
    """A learner, and what a run does around it.

    `facts` are what a checkpoint has to agree with and the loop does not know (the data's fingerprint, the tokenizer);
    `files` are carried into every checkpoint so that it can be used alone; `sample` writes some text with the model.
    """

    learner: Learner
    checkpointer: Any
    trackers: Any
    evaluation: Any
    meter: Meter
    log_every: int
    stop_at: int
    memory_in_use: Callable[[], int]
    sample: Callable[[], str] | None
    facts: Mapping[str, Any]
    files: Mapping[str, bytes]
    best: Best
    evaluated: tuple[int, dict[str, float]] = (-1, {})  # the step of the last evaluation, and what it found
    saved: int = -1
    failed_saves: int = 0
    status: str = "failed"  # until `fit` knows better

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's content, in place."""
        self.learner.load(tensors, state["learner"])
        self.best.load_state_dict(state["best"])
        self.meter.seconds = state["seconds"]
        self.saved = self.learner.step

    def fit(self) -> str:
        """Train until the end, and say which end it was: `done`, `patience` or the name of a signal.

        Raises:
            DivergedError: the loss or a gradient was not finite; a checkpoint from before that step is saved.
            SaveFailed: checkpoints cannot be saved any more.
        """
        with Signals(self.trackers.note) as self.signals:
            self.meter.start(self.learner.step)
            while (end := self.end()) is None:
                self.one_step()
            self.save(last=True)
        self.status = end
        return end

    def end(self) -> str | None:
        """Why the loop should stop here, if it should."""
        if self.signals.asked:
            return self.signals.asked
        if self.learner.step >= self.stop_at:
            return "done"
        return "patience" if self.best.exhausted(self.evaluation.patience) else None

    def one_step(self) -> None:
        metrics = self.learner.train_step()
        step = self.learner.step
        last = step == self.stop_at
        epoch_end = int(self.epoch(step)) > int(self.epoch(step - 1))
        evaluate = last or self.evaluation.due(step)
        log = last or evaluate or step % self.log_every == 0
        save = last or self.checkpointer.due(step, epoch_end=epoch_end)
        if log or save or self.learner.ranks.device.type == "cpu":  # elsewhere looking would wait for the device
            self.refuse_bad_step()
        record = self.read(metrics) if log else {}
        if evaluate and (found := self.evaluate()):
            record |= found
            improved = self.counts(step) and self.best.update(step, found[self.evaluation.metric])
            save = save or (improved and self.checkpointer.keeps_best)
        if log:
            self.trackers.log(step, record)
        if save:
            self.save(epoch_end=epoch_end)

    def epoch(self, step: int) -> float:
        return self.learner.loader.epoch(step)

    def counts(self, step: int) -> bool:
        """Whether an evaluation here is one that an undisturbed run makes: where a run stops must not decide more."""
        return self.evaluation.due(step) or step == self.learner.steps

    def read(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The step's metrics as numbers: the only place that waits for the device."""
        step = self.learner.step
        record = {name: float(value) for name, value in metrics.items()} | {"epoch": self.epoch(step)}
        return record | self.meter.read(step, self.stop_at) | {"memory_gb": self.memory_in_use() / 1e9}

    def evaluate(self) -> dict[str, float] | None:
        """The validation split's metrics and a sample of text; None when a signal cut the evaluation short."""
        learner = self.learner
        with self.meter.pause():
            batches = learner.loader.validation(self.evaluation.batches)
            found = learner.task.evaluate(
                learner.model, batches, ranks=learner.ranks, stop=lambda: self.signals.asked is not None
            )
            if found is None:
                return None
            if self.sample:
                self.trackers.text(learner.step, "sample", self.sample())
        self.evaluated = (learner.step, found)
        return found

    def save(self, *, epoch_end: bool = False, last: bool = False) -> None:
        """Save this step, once. A save that fails warns and leaves it to the next one, unless there will be none."""
        step = self.learner.step
        if self.saved == step:
            return
        with self.meter.pause():
            begin = time.perf_counter()
            try:
                facts = self.facts_of(step, epoch_end)
                self.checkpointer.save(step, self.learner.tensors(), self.state(), self.files, facts=facts)
            except SaveFailed as error:
                self.failed_saves += 1
                if last or self.failed_saves >= SAVE_ATTEMPTS:
                    raise
                self.trackers.note(f"warning: {error}; training goes on, and the next save tries again")
                return
        self.failed_saves, self.saved = 0, step
        self.trackers.note(f"saved step {step} in {time.perf_counter() - begin:.2f} s")
        self.tell_what_was_found()

    def tell_what_was_found(self) -> None:
        """Pass on what the checkpointer has to say to a person."""
        while self.checkpointer.notes:
            self.trackers.note(self.checkpointer.notes.pop(0))

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
        }

    def state(self) -> dict[str, Any]:
        """What a run goes on from beside the tensors, as JSON."""
        return {
            "learner": self.learner.state(),
            "best": self.best.state_dict(),
            "seconds": self.meter.seconds,
            **self.facts,
        }

    def refuse_bad_step(self) -> None:
        """Stop at a loss or gradient that is not finite. The weights are still those before that step: keep them."""
        bad = self.learner.failed_at()
        if bad is None:
            return
        self.learner.step = bad
        self.save(last=True)
        ids = self.learner.loader.at(bad)["ids"].tolist()
        raise DivergedError(
            f"step {bad + 1}: the loss or its gradient is not finite (batch of samples {ids}); the weights before it "
            f"are saved as step {bad}; lower optimizer.lr, raise schedule.warmup, or look at those samples"
        )
