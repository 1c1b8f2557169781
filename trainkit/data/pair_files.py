"""Pairs in files: rows of two texts or more, and perhaps a score, from TSV, CSV, JSON lines, Parquet and Hugging Face
data sets.

Columns are named, or numbered from 0 where a file has no names.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainkit.data import hub
from trainkit.data.sources import LINES, TABLES, find, kind_of, opened, parquet
from trainkit.errors import UserError, nearest

KNOWN = (  # names that common data sets give to their columns, the first that fits
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("query", "answer"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("text",),
)
SCORES = ("score", "similarity_score", "label")
Row = tuple[tuple[str, ...], float | None]


def read(source: str, columns: Sequence[str], score: str | None) -> Iterator[Row]:
    """The rows of a source: their texts, and their score if there is one. An empty list of `columns` finds them by
    name; a file of lines without tabs has one text each.

    Raises:
        UserError: no such file or column, or a row that lacks a text or a number, with its place.
    """
    if hub.is_dataset(source):
        table = hub.dataset(source, columns[0] if columns else None)
        yield from _named(table, list(table.column_names), columns, score, source)
        return
    for file in find([source])[0]:
        if kind_of(file) in TABLES:
            table = parquet().ParquetFile(file)
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from _named(rows, table.schema_arrow.names, columns, score, str(file))
        elif kind_of(file) in LINES:
            yield from _lines(file, columns, score)
        else:
            yield from _separated(file, columns, score)


def _named(
    rows: Iterable[dict[str, Any]], names: list[str], columns: Sequence[str], score: str | None, place: str
) -> Iterator[Row]:
    wanted, scored = chosen(names, columns, score, place)
    for number, row in enumerate(rows, 1):
        yield _row([row.get(name) for name in wanted], row.get(scored) if scored else None, scored, place, number)


def _lines(file: Path, columns: Sequence[str], score: str | None) -> Iterator[Row]:
    wanted: list[str] = []
    scored: str | None = None
    with opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file} line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file} line {number}: it is no object with a field for each text")
            if not wanted:
                wanted, scored = chosen(list(row), columns, score, str(file))
            yield _row(
                [row.get(name) for name in wanted], row.get(scored) if scored else None, scored, str(file), number
            )


def _separated(file: Path, columns: Sequence[str], score: str | None) -> Iterator[Row]:
    """Rows of a CSV file, quoted as usual, or else of a file with tabs, in which a quote is a quote. Its first row has
    names if these are the ones that are looked for."""
    is_csv = kind_of(file) == ".csv"
    with opened(file) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as text:
        try:
            rows = csv.reader(text) if is_csv else csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
            first = next(rows, [])
            numbers = [str(i) for i in range(len(first))]
            asked = [*columns, *([score] if score else [])]
            guessed = not columns and any(set(known) <= set(first) for known in KNOWN)
            named = guessed or not all(name.isdigit() for name in asked)
            names = first if named else numbers
            wanted, scored = chosen(names, columns, score, str(file), numbered=not named)
            places = {name: i for i, name in enumerate(names)}
            for number, row in enumerate([] if named else [first], 1):
                yield _row(_at(row, wanted, places), _at(row, [scored], places)[0], scored, str(file), number)
            for number, row in enumerate(rows, 2):
                if row:
                    yield _row(_at(row, wanted, places), _at(row, [scored], places)[0], scored, str(file), number)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as {'CSV' if is_csv else 'text with tabs'}: {error}") from error


def _at(row: list[str], wanted: Sequence[str | None], places: dict[str, int]) -> list[Any]:
    return [row[places[name]] if name is not None and places[name] < len(row) else None for name in wanted]


def chosen(
    names: list[str], columns: Sequence[str], score: str | None, place: str, *, numbered: bool = False
) -> tuple[list[str], str | None]:
    """The columns of the texts and that of the score, if there is one.

    Raises:
        UserError: they are not among `names`, or cannot be guessed.
    """
    if not columns and numbered:
        columns = names[: min(len(names), 3)]
    if not columns:
        columns = next((known for known in KNOWN if set(known) <= set(names)), ())
        if not columns:
            raise UserError(f"{place} has the columns {', '.join(names)}: say which are texts, data.columns=[ONE,TWO]")
        score = score or next((name for name in SCORES if name in names), None)
    for name in [*columns, *([score] if score else [])]:
        if name not in names:
            raise UserError(f"{place} has no column '{name}'{nearest(name, names)}")
    return list(columns), score


def _row(texts: list[Any], score: Any, scored: str | None, place: str, number: int) -> Row:
    """A row of which the first two texts are there; a hard negative may be missing."""
    for column, text in enumerate(texts):
        if not isinstance(text, str) and (text is not None or column < 2):
            raise UserError(f"{place} row {number}: its column {column + 1} of the texts holds {_said(text)}")
    if scored is None:
        return tuple(text or "" for text in texts), None
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place} row {number}: its {scored} is {_said(score)}, which is no number")
    return tuple(text or "" for text in texts), value


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
