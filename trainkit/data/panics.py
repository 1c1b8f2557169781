"""Libraries in Rust that panic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """A library in Rust that panics raises what is no `Exception`, after it wrote a page to stderr: here a ValueError,
    and no page."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"its library gave up: {error}") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
