"""Being asked to stop or to save: by a signal, by a file that appears, or by an address that answers.

A stop before the first step of this process loses nothing, so it happens at once, wherever the program is: preparing
text, loading, compiling. Later it sets a flag, which has to be looked at wherever the loop may stay long.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from trainkit.errors import STOPPED

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAVING = signal.SIGUSR1
POLL_S = 5.0
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal for the end of the parent
COMPILERS = ("torch._dynamo", "torch._inductor")


class StopNow(BaseException):
    """Asked to stop while there is nothing to lose. Exit code 75."""

    exit_code = STOPPED


class Signals:
    """Inside `with`, `asked` becomes what asked to stop, and `save_asked` true, instead of the process ending.

    `immediate`: nothing is to be lost yet, so a stop raises StopNow from wherever the program is; where torch compiles, the
    process ends there, with StopNow's words and exit code.
    """

    def __init__(self, note: Callable[[str], None] = print, notice: str | None = None) -> None:
        self.asked: str | None = None
        self.since = 0.0  # when, by time.monotonic
        self.save_asked = False
        self.immediate = True
        self.note, self._notice = note, notice
        self._previous: dict[signal.Signals, object] = {}
        self._done = threading.Event()

    def __enter__(self) -> "Signals":
        for number in (*STOPPING, SAVING):
            self._previous[number] = signal.signal(number, self._received)
        if self._notice:
            threading.Thread(target=self._poll, name="notice", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned
        if self.asked is not None and self.immediate and isinstance(error, Exception):
            raise self._stopped() from error  # a compiler that is interrupted makes an error of its own of it

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == SAVING:
            self.save_asked = True
            return
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.asked is None
        self._ask(self.asked or signal.Signals(number).name)
        if self.immediate:
            if _compiling(frame):
                os.write(sys.__stderr__.fileno(), f"trainkit: {self._stopped()}\n".encode())  # type: ignore[union-attr]
                os._exit(STOPPED)
            raise self._stopped()
        if first:
            self.note(f"{self.asked}: saving, then leaving (Ctrl-C again leaves at once)")

    def _stopped(self) -> StopNow:
        return StopNow(f"stopped by {self.asked} before the first step: nothing is lost")

    def _ask(self, why: str) -> None:
        self.asked, self.since = why, time.monotonic()

    def _poll(self) -> None:
        assert self._notice is not None
        while not self._done.wait(POLL_S):
            if self.asked is None and announced(self._notice):
                signal.raise_signal(signal.SIGTERM)  # so that it is handled in the first thread, like any other
                return


def _compiling(frame: FrameType | None) -> bool:
    """Whether torch's compiler is at work: it calls Python from native code that an exception may not pass, and then aborts
    (1 stop in 244 of such runs)."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(COMPILERS):
            return True
        frame = frame.f_back
    return False


def leave_at_once() -> None:
    """Until a `Signals` takes over, a SIGTERM ends the process with 75: a wrapper can tell it from a failure. While Python
    takes itself down, which forgets handlers, it does nothing: all is done by then, and the exit code says how. The end of
    the torchrun that started this process is such a SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(STOPPED))
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":  # else ranks would outlive it, and keep the run
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


def announced(notice: str) -> bool:
    """Whether this machine is about to go: the file `notice` is there, or the http(s) address answers with success, as
    those of cloud providers do from the moment of the notice on."""
    if not notice.startswith(("http://", "https://")):
        return Path(notice).exists()
    try:
        with urllib.request.urlopen(notice, timeout=2) as answer:
            return bool(200 <= answer.status < 300)
    except (urllib.error.URLError, OSError, ValueError):
        return False
