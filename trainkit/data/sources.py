"""Documents in files: plain text, JSON lines and Parquet, plain or compressed, and Hugging Face data sets.

Work is cut into spans that can be read apart. A span of a plain text or JSON-lines file takes the lines that begin in
it, so that no line and no UTF-8 character is cut; a document of text may go over several spans.
"""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainkit.errors import UserError

TEXT = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".py", ".c", ".h", ".org", ".log"}
LINES = {".jsonl", ".ndjson"}
TABLES = {".parquet"}
COMPRESSED = {".gz", ".zst"}
BUILTIN = {"moby-dick": "moby-dick.jsonl.gz"}
SPAN_BYTES = 16 << 20


@dataclass(frozen=True)
class Span:
    """A part of a source that is read at once. `number` is the file's place among the files; the units of `start` and
    `stop` are bytes, row groups of Parquet, or rows of a data set."""

    path: str
    kind: str
    start: int
    stop: int
    bytes: int
    number: int
    first: bool
    last: bool


def find(sources: list[str]) -> tuple[list[Path], int]:
    """The files that the sources name, folders searched in sorted order, and how many files of folders are no text.

    Raises:
        UserError: a source is not there, is empty, or has nothing to read.
    """
    files, skipped = [], 0
    for source in sources:
        path = _builtin(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
            known = [p for p in inside if kind_of(p) in TEXT | LINES | TABLES]
            skipped += len(inside) - len(known)
            if not known:
                raise UserError(f"{source} holds no text: looked for *{', *'.join(sorted(TEXT | LINES | TABLES))}")
            files += known
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{source} does not exist: give a file or folder of text, JSONL or Parquet")
    files = [f for f in files if f.stat().st_size > 0]
    if not files:
        raise UserError(f"{', '.join(sources)}: nothing but empty files")
    return files, skipped


def spans(files: list[Path]) -> Iterator[Span]:
    """The files cut into spans, in order."""
    for number, file in enumerate(files):
        suffix, size = kind_of(file), file.stat().st_size
        if suffix in TABLES:
            groups = parquet().ParquetFile(file).num_row_groups
            each = max(1, size // max(1, groups))
            for g in range(groups):
                yield Span(str(file), "table", g, g + 1, each, number, g == 0, g == groups - 1)
            continue
        kind = "lines" if suffix in LINES else "text"
        step = size if file.suffix in COMPRESSED else SPAN_BYTES
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield Span(str(file), kind, start, stop, stop - start, number, start == 0, stop == size)


def read(span: Span, field: str) -> Iterator[tuple[str, bool]]:
    """The span's texts in order, each with whether its document ends there.

    Raises:
        UserError: not UTF-8, not JSON, or no such field or column, with the file and the place.
    """
    if span.kind == "table":
        yield from ((text, True) for text in _column(span, field))
    elif span.kind == "rows":
        yield from ((str(row[field]), True) for row in _rows(span, field))
    elif span.kind == "lines":
        for offset, line in lines(span):
            if line.strip():
                yield _field(line, field, f"{span.path} at byte {offset}"), True
    else:
        chunk = b"".join(line for _, line in lines(span))
        yield _decoded(chunk, span.path, _first_byte(span)), span.last


def lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin inside the span."""
    with opened(Path(span.path)) as file:
        compressed = Path(span.path).suffix in COMPRESSED
        offset = 0 if compressed else _seek(file, span.start)
        stop = None if compressed else span.stop
        while stop is None or offset < stop:
            line = file.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _seek(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _first_byte(span: Span) -> int:
    if Path(span.path).suffix in COMPRESSED:
        return 0
    with open(span.path, "rb") as file:
        return _seek(file, span.start)


def _decoded(chunk: bytes, path: str, base: int) -> str:
    try:
        return chunk.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {base + error.start} ({chunk[error.start]:#04x})") from error


def _field(line: bytes, field: str, place: str) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at its byte {error.start}") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        has = f"it has {', '.join(map(str, value))}" if isinstance(value, dict) else "the line is no object"
        raise UserError(f"{place}: no text in the field '{field}'; {has}: name the field with data.field=")
    text: str = value[field]
    return text


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read, decompressed."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield file  # type: ignore[misc]  # reads like any binary file
        elif path.suffix == ".zst":
            with path.open("rb") as raw, _zstandard().ZstdDecompressor().stream_reader(raw) as reader:
                import io

                yield io.BufferedReader(reader)
        else:
            with path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _column(span: Span, field: str) -> list[str]:
    table = parquet().ParquetFile(span.path)
    if field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{span.path} has no column '{field}' but {names}: name it with data.field=")
    column: list[str | None] = table.read_row_group(span.start, columns=[field]).column(field).to_pylist()
    return [text for text in column if text]


def _rows(span: Span, field: str) -> Iterator[Any]:
    from trainkit.data.hub import dataset

    yield from dataset(span.path, field).select(range(span.start, span.stop))


def _builtin(source: str) -> Path:
    if not source.startswith("builtin:"):
        return Path(source)
    name = source.removeprefix("builtin:")
    if name not in BUILTIN:
        raise UserError(f"there is no built-in corpus '{name}': {', '.join(BUILTIN)}")
    return Path(__file__).parent / "corpora" / BUILTIN[name]


def kind_of(path: Path) -> str:
    """What kind of file it is, compressed or not."""
    return Path(path.stem).suffix.lower() if path.suffix in COMPRESSED else path.suffix.lower()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def parquet() -> Any:
    """The library that reads Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install 'trainkit[data]'") from error
    return pyarrow.parquet


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst needs zstandard: pip install 'trainkit[data]'") from error
    return zstandard
