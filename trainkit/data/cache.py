"""Text prepared on the fly, once: kept under what it holds, so that a second run, or another path, finds it again."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainkit import atomic
from trainkit.data import hub
from trainkit.data.prepare import Report, plan, prepare
from trainkit.data.shards import FORMAT, Corpus, hash_file, open_corpus
from trainkit.data.sources import find
from trainkit.data.tokenizers import TokenizerConfig
from trainkit.errors import UserError

HASHES = "content-hashes.json"


def folder() -> Path:
    """Where prepared text is kept: TRAINKIT_CACHE, or ~/.cache/trainkit."""
    return Path(os.environ.get("TRAINKIT_CACHE") or Path.home() / ".cache" / "trainkit")


def prepared(
    source: str, tokenizer: TokenizerConfig, *, field: str, validation: float, report: Report | None
) -> Corpus:
    """The corpus of a source, prepared now unless it is kept already.

    Raises:
        UserError: the source is wrong, or the cache cannot be written.
    """
    root = folder()
    with usable(root):
        content = source if hub.is_dataset(source) else _content(source, root, report)
        key = hashlib.sha256(json.dumps([FORMAT, content, tokenizer.key(), field, validation]).encode()).hexdigest()
        kept = root / "text" / key[:32]
        with alone(kept):  # another process may be preparing the same
            work = plan([source], tokenizer, field=field, validation=validation, content=key)
            prepare(work, tokenizer, kept, report=report)
    return open_corpus(kept, source.removeprefix("builtin:"))


def _content(source: str, root: Path, report: Report | None) -> str:
    """A hash of the content of all files of a source, in order. What did not change since is not read again."""
    known_file = root / HASHES
    known = json.loads(known_file.read_bytes()) if known_file.exists() else {}
    files, _ = find([source])
    sizes = [f.stat().st_size for f in files]
    hashes, fresh, done = [], {}, 0
    for file, size in zip(files, sizes, strict=True):
        stat = file.stat()
        mark = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if mark not in known:
            fresh[mark] = hash_file(file)
        hashes.append(known.get(mark) or fresh[mark])
        done += size
        if report and sum(sizes) > 256 << 20:
            report(done, sum(sizes), "hashing")
    if fresh:
        atomic.write(known_file, json.dumps(known | fresh).encode())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@contextmanager
def usable(place: Path) -> Iterator[None]:
    """Make a folder of the cache.

    Raises:
        UserError: it cannot be made, or what is done inside fails for want of room or rights.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"the cache {folder()} cannot be used ({error.strerror}): set TRAINKIT_CACHE to a folder"
        ) from error


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """A folder of the cache, made if it is not there, with no other process in it meanwhile."""
    with usable(place), _locked(place / ".lock"):
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
