"""Being asked to stop: the first signal asks, the second Ctrl-C leaves at once."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: what SLURM's --signal usually sends


class Signals:
    """Inside `with`, a stop signal sets `asked` to its name instead of ending the process.

    `asked` has to be looked at wherever the loop may stay long: between steps and between evaluation batches.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.asked: str | None = None
        self._note = note
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        for number in ASKING:
            self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self._note(f"{self.asked}: saving, then leaving (Ctrl-C again leaves at once)")
