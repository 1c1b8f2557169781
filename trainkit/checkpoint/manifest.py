"""What a checkpoint is, said by itself: every file's size and hash, every tensor's dtype and shape, and its own hash.

Canonical JSON (sorted keys, no spaces), read strictly: a key that stands twice, a number that is none, a name with a
slash is refused. Whatever is not exactly what was written is no checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
NAME = "manifest.json"
MAX_BYTES = 64 << 20
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELDS = {"format", "run", "step", "time", "versions", "facts", "files", "tensors", "sha256"}


class BadCheckpoint(ValueError):
    """It is not what was saved: torn, changed, half there, or something else."""


@dataclass(frozen=True)
class Manifest:
    """`facts` are small numbers for people and for retention: metric, epoch, epoch_end, val_loss. `files` maps names to
    size and xxh3_128; `tensors` maps names to dtype, shape and file."""

    run: str
    step: int
    time: float
    versions: Mapping[str, str]
    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        return sum(int(f["size"]) for f in self.files.values())

    def encode(self) -> bytes:
        """The manifest as it is written."""
        body = {"format": FORMAT, **self.__dict__}
        return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


def decode(raw: bytes) -> Manifest:
    """The manifest that `encode` wrote.

    Raises:
        BadCheckpoint: it did not.
    """
    value = parse(raw)
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise BadCheckpoint(f"{NAME} is not a manifest")
    digest = value.pop("sha256")
    if value["format"] != FORMAT:
        raise BadCheckpoint(f"{NAME} has format {value['format']}; this trainkit reads {FORMAT}")
    if hashlib.sha256(canonical(value)).hexdigest() != digest or canonical({**value, "sha256": digest}) != raw:
        raise BadCheckpoint(f"{NAME} does not have its own hash")
    del value["format"]
    if bad := [name for name in value["files"] if not _FILE.fullmatch(name) or name == NAME]:
        raise BadCheckpoint(f"{NAME} names a file {bad[0]!r}")
    return Manifest(**value)


def parse(raw: bytes) -> Any:
    """JSON in which no key stands twice and every number is one.

    Raises:
        BadCheckpoint: it is not that.
    """
    try:
        return json.loads(raw, object_pairs_hook=_no_key_twice, parse_constant=_no_such_number)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"not the JSON that was written: {error}") from error


def canonical(value: Any) -> bytes:
    """JSON that equal values have equal bytes of.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _no_such_number(text: str) -> None:
    raise ValueError(f"{text} is no number")
