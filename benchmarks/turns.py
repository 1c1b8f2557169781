"""Systems in processes of their own that take turns: each takes one when it is told to, and says what it found as JSON."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def worker(command: Sequence[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """A system's process, and what has it take a turn."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        into, out = process.stdin, process.stdout
        assert into is not None
        assert out is not None

        def ask() -> dict[str, Any]:
            into.write("go\n")
            into.flush()
            line = next((line for line in out if line.startswith("{")), None)
            if line is None:
                raise RuntimeError(f"{' '.join(command)} left without an answer")
            found: dict[str, Any] = json.loads(line)
            return found

        try:
            yield ask
        finally:
            into.close()


def serve(turn: Callable[[], dict[str, Any]]) -> None:
    """Take a turn for every line that comes in."""
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)
