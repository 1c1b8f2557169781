"""Text to token shards: in parallel, restartable after a kill, the same bytes whatever the number of workers.

The sources are cut into pieces of about 16 MiB that do not depend on who encodes them. A finished piece leaves its files
and then a journal entry, each renamed into place; what has no entry is done again; the index comes last.
"""

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from trainkit import atomic
from trainkit.data import hub, tokenizers
from trainkit.data.shards import FORMAT, INDEX, TOKENIZER, hash_file
from trainkit.data.sources import SPAN_BYTES, Span, find, read, spans
from trainkit.data.tokenizers import Tokenizer, TokenizerConfig
from trainkit.errors import UserError

Report = Callable[[int, int, str], None]
TRAINING_BYTES = 256 << 20  # of text that a bpe learns from
JOURNAL, PLAN = "piece-{:05d}.json", "plan.json"


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, in pieces."""

    pieces: list[list[Span]]
    key: str
    skipped: int
    field: str
    every: int  # one document in so many is held out; 0 for none
    validation: float

    @property
    def bytes(self) -> int:
        return sum(span.bytes for piece in self.pieces for span in piece)


def plan(
    sources: list[str], tokenizer: TokenizerConfig, *, field: str, validation: float, content: str | None = None
) -> Plan:
    """Cut the sources into pieces; nothing is written. `content` says what the files hold, where that is known; else
    their paths, sizes and times do.

    Raises:
        UserError: a source is missing or empty.
    """
    names = [s for s in sources if not hub.is_dataset(s)]
    files, skipped = find(names) if names else ([], 0)
    every_span = list(spans(files))
    facts: list[Any] = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    for source in sources:
        if hub.is_dataset(source):
            found, fingerprint = hub.rows(source, field, len(facts))
            every_span, facts = every_span + found, [*facts, (source, fingerprint)]
    what = [FORMAT, content or facts, tokenizer.key(), field, validation]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    every = round(1 / validation) if validation > 0 else 0
    return Plan(_pieces(every_span), key, skipped, field, every, validation)


def prepare(
    plan: Plan, tokenizer: TokenizerConfig, out: Path, *, workers: int | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Write the shards of `plan` into `out`, and give back the index.

    Raises:
        UserError: `out` holds another preparation, a text is not what it should be, or the disk is full.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).exists() and json.loads((out / PLAN).read_bytes())["key"] != plan.key:
        raise UserError(f"{out} holds another preparation (other sources, tokenizer or options): choose another folder")
    if (out / INDEX).exists():
        index: dict[str, Any] = json.loads((out / INDEX).read_bytes())
        return index
    try:
        atomic.write(out / PLAN, json.dumps({"key": plan.key}).encode())
        built = _tokenizer(plan, tokenizer, out)
        _encode_all(plan, built, out, workers, report or (lambda done, total, what: None))
        index = _index(plan, built, out)
        atomic.write(out / INDEX, json.dumps(index, indent=1).encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(f"{out} cannot be written: {error.strerror}; free some space or choose another") from error
        raise
    for i in range(len(plan.pieces)):
        (out / JOURNAL.format(i)).unlink()
    return index


def _pieces(every_span: list[Span]) -> list[list[Span]]:
    pieces: list[list[Span]] = []
    size = SPAN_BYTES
    for span in every_span:
        if size + span.bytes > SPAN_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(span)
        size += span.bytes
    return pieces


def _tokenizer(plan: Plan, cfg: TokenizerConfig, out: Path) -> Tokenizer:
    """The tokenizer of an earlier try, or a new one."""
    if not (out / TOKENIZER).exists():
        atomic.write(out / TOKENIZER, cfg.build(lambda: _texts(plan)).save())
    return tokenizers.load((out / TOKENIZER).read_bytes())


def _texts(plan: Plan) -> Iterator[str]:
    taken = 0
    for piece in plan.pieces:
        for span in piece:
            for text, _ in read(span, plan.field):
                yield text
                taken += len(text)
                if taken > TRAINING_BYTES:
                    return


def _encode_all(plan: Plan, tokenizer: Tokenizer, out: Path, workers: int | None, report: Report) -> None:
    sizes = [sum(span.bytes for span in piece) for piece in plan.pieces]
    todo = [i for i in range(len(plan.pieces)) if not _finished(out, i)]
    done = plan.bytes - sum(sizes[i] for i in todo)
    processes = min(workers or os.cpu_count() or 1, len(todo))
    report(done, plan.bytes, "tokenizing")
    if processes <= 1:
        for i in todo:
            encode_piece(plan, i, tokenizer, out)
            report(done := done + sizes[i], plan.bytes, "tokenizing")
        return
    saved = tokenizer.save()
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)
    with pool:
        jobs = {pool.submit(_encode_in_worker, plan, i, saved, out): i for i in todo}
        try:
            for job in as_completed(jobs):
                job.result()
                report(done := done + sizes[jobs[job]], plan.bytes, "tokenizing")
        except BrokenProcessPool as error:
            raise RuntimeError("a worker was killed (out of memory?): run the same command again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business


def _encode_in_worker(plan: Plan, i: int, saved: bytes, out: Path) -> None:
    encode_piece(plan, i, tokenizers.load(saved), out)


def encode_piece(plan: Plan, i: int, tokenizer: Tokenizer, out: Path) -> None:
    """Write piece `i`'s files and then its journal entry."""
    dtype = _dtype(tokenizer)
    ids: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "validation": []}
    documents = text_bytes = 0
    end = np.array([tokenizer.eos], dtype=dtype)
    for span in plan.pieces[i]:
        ordinal = 0
        for text, ends in read(span, plan.field):
            number = span.number if span.kind == "text" else ordinal
            split = "validation" if plan.every and number % plan.every == plan.every // 2 else "train"
            ids[split].append(tokenizer.encode(text).astype(dtype))
            if ends:
                ids[split].append(end)
            ordinal, documents, text_bytes = ordinal + 1, documents + ends, text_bytes + len(text.encode())
    files = {}
    for split, arrays in ids.items():
        if arrays:
            name = f"{split}-{i:05d}.bin"
            joined = np.concatenate(arrays)
            atomic.write(out / name, joined.tobytes())
            files[name] = {"split": split, "tokens": len(joined), "xxh3_128": hash_file(out / name)}
    entry = {"files": files, "documents": documents, "text_bytes": text_bytes}
    atomic.write(out / JOURNAL.format(i), json.dumps(entry).encode())


def _finished(out: Path, i: int) -> bool:
    """Whether an earlier try finished piece `i`, and its files are still what it wrote."""
    entry = out / JOURNAL.format(i)
    if not entry.exists():
        return False
    files = json.loads(entry.read_bytes())["files"]
    return all((out / name).exists() and hash_file(out / name) == f["xxh3_128"] for name, f in files.items())


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"


def _index(plan: Plan, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    entries = [json.loads((out / JOURNAL.format(i)).read_bytes()) for i in range(len(plan.pieces))]
    files = {name: facts for entry in entries for name, facts in entry["files"].items()}
    splits = _splits(files, plan)
    identity = tokenizer.identity
    content = [identity, [(f["tokens"], f["xxh3_128"]) for f in files.values()], splits]
    return {
        "format": FORMAT,
        "dtype": _dtype(tokenizer),
        "tokenizer": identity,
        "eos": tokenizer.eos,
        "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "documents": sum(entry["documents"] for entry in entries),
        "text_bytes": sum(entry["text_bytes"] for entry in entries),
        "tokens": {split: sum(b - a for _, a, b in segments) for split, segments in splits.items()},
        "splits": splits,
        "files": files,
    }


def _splits(files: dict[str, Any], plan: Plan) -> dict[str, list[tuple[str, int, int]]]:
    """The segments of each split. Where too few documents leave a split empty, the tail of the text is held out."""
    splits: dict[str, list[tuple[str, int, int]]] = {"train": [], "validation": []}
    for name, facts in files.items():
        splits[facts["split"]].append((name, 0, facts["tokens"]))
    if not plan.every or (splits["train"] and splits["validation"]):
        return splits
    whole = splits["train"] + splits["validation"]
    held_out = max(1, int(plan.validation * sum(b for _, _, b in whole)))
    tail: list[tuple[str, int, int]] = []
    while held_out > 0:
        name, start, stop = whole.pop()
        cut = max(start, stop - held_out)
        tail.insert(0, (name, cut, stop))
        held_out -= stop - cut
        if cut > start:
            whole.append((name, start, cut))
    return {"train": whole, "validation": tail}
