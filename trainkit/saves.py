"""A run's saves as its loop sees them: which step was saved last, how saves ended, and what to say of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainkit.checkpoint import SaveFailed


@dataclass
class Saves:
    """`note` tells whoever watches, `tell` whoever does not."""

    checkpointer: Any
    note: Callable[[str], None]
    tell: Callable[[str], None]
    last: int = -1  # the step that was saved last, or is being saved
    failed: list[SaveFailed] = field(default_factory=list)  # in a row
    longest_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of saves that ended since somebody took them

    def hear(self) -> None:
        """Say how saves ended that were under way, and what the checkpointer has to say to a person."""
        for outcome in self.checkpointer.finished():
            if outcome.error is None:
                self.failed = []
                self.longest_s = max(self.longest_s, outcome.save_s)
                self.metrics |= {"checkpoint_stall_s": outcome.stall_s, "checkpoint_save_s": outcome.save_s}
                waited = f", {outcome.stall_s:.2f} s of it waited for" if outcome.stall_s < outcome.save_s else ""
                self.note(f"saved step {outcome.step} in {outcome.save_s:.2f} s{waited}")
            else:
                self.failed.append(outcome.error)
                self.last = -1
                self.note(f"warning: {outcome.error}; training goes on, and the next save tries again")
                self.tell(str(outcome.error))
        self.pass_on()

    def pass_on(self) -> None:
        """Say what the checkpointer found."""
        while self.checkpointer.notes:
            self.note(self.checkpointer.notes.pop(0))

    def take_metrics(self) -> dict[str, float]:
        """For the next step that is logged."""
        taken, self.metrics = self.metrics, {}
        return taken

    def too_late(self, left_s: float) -> bool:
        """Whether a save may take longer than is left."""
        return 1.5 * self.longest_s > left_s
