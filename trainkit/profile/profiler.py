"""When to look. A watch looks at some steps in a row; one that can also looks at the first evaluation and the first save."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Watch(Protocol):
    """Looks at the steps `first` to `last` of this process, which count from 1."""

    first: int
    last: int

    def start(self) -> None:
        """Begin to look."""

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Inside is step `number` of the run."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Inside is something else than a step, while this watch looks."""

    def aside(self, name: str) -> AbstractContextManager[Any] | None:
        """Look at something else than a step, while no watch looks; None where there is nothing to be learned from it."""

    def stop(self) -> None:
        """Look no more at steps."""

    def write(self) -> list[str]:
        """Write all that was seen, and say so, in one line or with a table below it.

        Raises:
            OSError: it cannot be written.
        """


class Profiler:
    """The watches of a run. Without any, it does nothing."""

    def __init__(self, watches: Sequence[Watch] = (), note: Callable[[str], None] = print) -> None:
        self._watches, self._note = list(watches), note
        self._steps = 0  # of this process
        self._looking: Watch | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Inside is step `number` of the run."""
        self._steps += 1
        if self._looking is None:
            self._looking = next((w for w in self._watches if w.first == self._steps), None)
            if self._looking:
                self._looking.start()
        with self._looking.step(number) if self._looking else nullcontext():
            yield
        if self._looking and self._looking.last <= self._steps:
            self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside is a part of the run that is no step, such as an evaluation or a save."""
        if self._looking:
            with self._looking.phase(name):
                yield
            return
        for watch in self._watches:
            if look := watch.aside(name):
                with look:
                    yield
                self._write(watch)
                return
        yield

    def close(self) -> None:
        """Look no more: a run that ends early has been looked at for fewer steps."""
        if self._looking:
            looked, self._looking = self._looking, None
            looked.stop()
            for line in self._write(looked):
                self._note(line)

    def _write(self, watch: Watch) -> list[str]:
        try:
            return watch.write()
        except OSError as error:  # a run does not end because it is looked at
            return [f"warning: a profile cannot be written: {error}"]
