"""The mistakes of people and the failures of machines, each with the exit code that a script can tell it by."""

import os
from collections.abc import Iterable
from difflib import get_close_matches

DONE, FAILED, MISTAKE, DIVERGED, DAMAGED, STOPPED = 0, 1, 2, 70, 74, 75
AGAIN = "the same command, on each machine, goes on from the newest checkpoint"


class UserError(ValueError):
    """A person's mistake: one line that says what is wrong, where, the nearest choices and what to do. Exit code 2."""

    exit_code = MISTAKE


class RefusedError(UserError):
    """Each word is right, and a rule of the house refuses them together. Exit code 2, or a cell of a sweep left out."""


class DamagedError(RuntimeError):
    """Checkpoints exist and none of them is good: never a silent start from zero. Exit code 74."""

    exit_code = DAMAGED


class RanOutError(MemoryError):
    """Memory ran out, and half the microbatch is no way on from here. Exit code 1, so that torchrun starts anew."""

    exit_code = FAILED


class DivergedError(RuntimeError):
    """The loss or a gradient was not finite: going on by itself would only meet it again. Exit code 70."""

    exit_code = DIVERGED


class UnreliableError(RuntimeError):
    """The same step came out another way each time: this machine cannot be trusted with it. Exit code 70."""

    exit_code = DIVERGED


class LostError(RuntimeError):
    """Other ranks, or their machines, are gone. The line says all that is known of it. Exit code 1."""

    exit_code = FAILED


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'a'?` when a choice is close to `word`, else the list of choices."""
    choices = sorted(choices)
    close = get_close_matches(word, choices, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return f"; choices: {', '.join(choices)}" if choices else ""


def again() -> str:
    """What to do when other ranks are gone, for the end of a line; nothing where torchrun starts all of them again."""
    restarts, before = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return "" if before < restarts else f"; {AGAIN}"
