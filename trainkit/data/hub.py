"""Data sets of the Hugging Face hub, through its `datasets` library: `hf:NAME` or `hf:NAME:SPLIT`."""

from functools import cache
from typing import Any

from trainkit.data.sources import Span
from trainkit.errors import UserError, nearest

PREFIX = "hf:"
ROWS = 20_000


def is_dataset(source: str) -> bool:
    """Whether a source names a data set rather than a file."""
    return source.startswith(PREFIX)


@cache
def dataset(source: str, field: str | None) -> Any:
    """The data set, downloaded once into the library's own cache.

    Raises:
        UserError: the library is missing, the data set cannot be had, or it has no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{source} needs the datasets library: pip install 'trainkit[hf]'") from error
    name, _, split = source.removeprefix(PREFIX).partition(":")
    try:
        loaded = load_dataset(name, split=split or "train")
    except Exception as error:  # whatever a download raises
        raise UserError(f"{source} could not be loaded: {str(error).splitlines()[0]}") from error
    if field is not None and field not in loaded.column_names:
        raise UserError(f"{source} has no column '{field}'{nearest(field, loaded.column_names)}")
    return loaded


def rows(source: str, field: str, number: int) -> tuple[list[Span], str]:
    """The data set cut into spans, and its fingerprint."""
    loaded = dataset(source, field)
    size, each = len(loaded), max(1, loaded.data.nbytes // max(1, len(loaded)))
    starts = range(0, size, ROWS)
    spans = [
        Span(source, "rows", a, min(a + ROWS, size), each * min(ROWS, size - a), number, a == 0, a + ROWS >= size)
        for a in starts
    ]
    return spans, loaded._fingerprint
