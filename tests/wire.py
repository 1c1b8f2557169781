"""A wire between a client and a server on this machine, which can be cut: both stay connected, and nothing comes through any
more, as behind a dead switch."""

import contextlib
import select
import socket
import threading
from types import TracebackType

LOOK_S = 0.02


class Wire:
    """Inside `with`, whoever connects to `port` speaks with `target` on this machine, until it is `cut`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._cut, self._done = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ends: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._carry)

    def __enter__(self) -> "Wire":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Both sides are told that nobody is there any more."""
        self._done.set()
        self._thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def cut(self) -> None:
        """From here on nothing comes through."""
        self._cut.set()

    def mend(self) -> None:
        """What was sent meanwhile arrives."""
        self._cut.clear()

    def _carry(self) -> None:
        while not self._done.is_set():
            if self._cut.is_set():
                self._done.wait(LOOK_S)
                continue
            for end in select.select([self._listener, *self._ends], [], [], LOOK_S)[0]:
                if end is self._listener:
                    near, far = end.accept()[0], socket.create_connection(("127.0.0.1", self._target))
                    self._ends |= {near: far, far: near}
                elif end in self._ends and not self._cut.is_set():
                    self._pass_on(end)

    def _pass_on(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if text := end.recv(1 << 16):
                self._ends[end].sendall(text)
                return
        for closed in (self._ends.pop(end), end):
            self._ends.pop(closed, None)
            closed.close()
