"""Where a step's memory and time go. Looking changes nothing of what is learned.

Grade: exact. tests/profile/test_profiling.py trains with and without it and compares the weights to the bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainkit.config import config
from trainkit.profile.memory import MemoryProfile
from trainkit.profile.profiler import Profiler
from trainkit.profile.timing import TimeProfile

__all__ = ["MemoryProfile", "Profile", "Profiler", "TimeProfile"]


@config
class Profile:
    """Any of the profiles. Each looks at some steps of its own, because torch has one profiler a process."""

    memory: MemoryProfile | None = None
    time: TimeProfile | None = None

    def __post_init__(self) -> None:
        if self.memory and self.time and self.memory.last >= self.time.first and self.time.last >= self.memory.first:
            raise ValueError(
                f"profile.memory looks at steps {self.memory.first} to {self.memory.last} of a process and profile.time at "
                f"{self.time.first} to {self.time.last}, its warm-up included, and only one can look at a time: "
                f"change profile.time.after"
            )

    def check(self) -> None:
        """Refuse what cannot be done here.

        Raises:
            UserError: a package is missing.
        """
        if self.memory:
            self.memory.check()

    def build(self, folder: Path, learner: Any, note: Callable[[str], None]) -> Profiler:
        """What looks at `learner` (`model`, `optimizer`), writes into `folder` and says in one line what it found."""
        memory = self.memory.build(folder, learner.model, learner.optimizer) if self.memory else None
        time = self.time.build(folder, learner.ranks.device) if self.time else None
        return Profiler([watch for watch in (memory, time) if watch], note)
