"""Who is still there, when one rank does not answer: a call that every rank answers from a thread of its own, whatever else it
is doing or waiting for."""

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

DAY = timedelta(days=1)
ANSWER_S = 3.0  # within which whoever is there has answered
LOOK_S = 0.05


class Roll:
    """The ranks of a `store` of which a thread may have a connection of its own."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._thread = threading.Thread(target=self._answer, args=(store.clone(),), name="roll", daemon=True)
        self._thread.start()

    def missing(self) -> list[int] | None:
        """The ranks that do not answer; None where the store itself does not, so that nobody can be asked."""
        found: list[list[int]] = []
        caller = threading.Thread(target=self._call, args=(found,), name="roll call", daemon=True)
        caller.start()
        caller.join(2 * ANSWER_S)  # a store behind a cut wire would be waited for much longer
        return found[0] if found else None

    def _call(self, found: list[list[int]]) -> None:
        with contextlib.suppress(dist.DistError):
            self._store.set("call", "")
            end = time.monotonic() + ANSWER_S
            while missing := [r for r in range(self._size) if not self._store.check([f"here-{r}"])]:
                if time.monotonic() > end:
                    break
                time.sleep(LOOK_S)
            found.append(missing)

    def end(self) -> None:
        """Nobody will be called any more: all ranks say so, while the store is there."""
        self._store.set("call", "")
        self._thread.join(ANSWER_S)

    def _answer(self, store: Any) -> None:
        while True:
            begin = time.monotonic()
            try:
                store.wait(["call"], DAY)
                store.set(f"here-{self._rank}", "")
                return
            except dist.DistError:
                if time.monotonic() - begin < DAY.total_seconds():
                    return  # the store is gone, and with it the first rank or its machine; else nobody called all day
