"""What a checkpoint is, said by itself: every file's size and hash, every tensor's dtype and shape, and its own hash.

Canonical JSON (sorted keys, no spaces), read strictly: a key that stands twice, a number that is none, a name with a
slash, a shape that no tensor has is refused. Whatever is not exactly what was written is no checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.strict import one_line, parse_json

FORMAT = 1
NAME = "manifest.json"
MAX_BYTES = 64 << 20
MAX_STEP = 10**10  # of the folder's ten digits
MAX_TIME = 1 << 38  # seconds, in some thousands of years
MAX_SIZE = 1 << 60
MAX_CARRIED = 128 << 20  # of a file without tensors, which is held in memory
MAX_DIMS = 64  # as many as torch allows
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELDS = {"format", "run", "step", "time", "versions", "facts", "files", "tensors", "sha256"}


class BadCheckpoint(ValueError):
    """It is not what was saved: torn, changed, half there, or something else. Said in one line, whatever it quotes."""

    def __init__(self, what: str) -> None:
        super().__init__(one_line(what))


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
    if type(value["format"]) is not int or value["format"] != FORMAT:  # true and 1.0 are equal to 1
        raise BadCheckpoint(f"{NAME} has format {value['format']!r}; this trainkit reads {FORMAT}")
    if hashlib.sha256(canonical(value)).hexdigest() != digest or canonical({**value, "sha256": digest}) != raw:
        raise BadCheckpoint(f"{NAME} does not have its own hash")
    del value["format"]
    if wrong := _wrong(value):
        raise BadCheckpoint(f"{NAME}: {wrong}")
    return Manifest(**value)


def parse(raw: bytes) -> Any:
    """JSON in which no key stands twice and every number is one, neither large nor deep.

    Raises:
        BadCheckpoint: it is not that.
    """
    try:
        return parse_json(raw, max_bytes=MAX_BYTES)
    except ValueError as error:
        raise BadCheckpoint(f"not the JSON that was written: {error}") from error


def canonical(value: Any) -> bytes:
    """JSON that equal values have equal bytes of.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _wrong(value: dict[str, Any]) -> str | None:
    """What in a manifest's fields is not what it should be: whoever can write one can write its hash too."""
    files, tensors, facts = value["files"], value["tensors"], value["facts"]
    for name in ("versions", "facts", "files", "tensors"):
        if not isinstance(value[name], dict):
            return f"its {name} are no object"
    if not isinstance(value["run"], str) or not _natural(value["step"], MAX_STEP):
        return f"its run {value['run']!r} or its step {value['step']!r} is none"
    if not _number(value["time"]) or not 0 <= value["time"] < MAX_TIME:
        return f"its time {value['time']!r} is none"
    if bad := [k for k, v in value["versions"].items() if not isinstance(v, str)]:
        return f"its version of {bad[0]!r} is no text"
    if bad := [k for k in ("metric", "epoch", "val_loss") if facts.get(k) is not None and not _number(facts[k])]:
        return f"its {bad[0]} is no number"
    if not isinstance(facts.get("epoch_end", False), bool):
        return "its epoch_end is neither true nor false"
    if bad := [name for name in files if not _FILE.fullmatch(name) or name == NAME]:
        return f"it names a file {bad[0]!r}"
    if bad := [name for name, its in files.items() if not _is_file(its)]:
        return f"the size or the hash of the file {bad[0]!r} is none"
    if bad := [name for name, its in tensors.items() if not _is_tensor(its)]:
        return f"the dtype or the shape of the tensor {bad[0]!r} is none"
    if bad := [name for name, its in tensors.items() if not _is_placed(its.get("parts"), files)]:
        return f"the tensor {bad[0]!r} does not lie in its files"
    shards = {part[0] for its in tensors.values() for part in its.get("parts", [])}
    if bad := [name for name, its in files.items() if name not in shards and its["size"] > MAX_CARRIED]:
        return f"the file {bad[0]!r} has more than {MAX_CARRIED} bytes and no tensor"
    return None


def _is_file(its: Any) -> bool:
    return isinstance(its, dict) and _natural(its.get("size"), MAX_SIZE) and isinstance(its.get("xxh3_128"), str)


def _is_tensor(its: Any) -> bool:
    """Whether a dtype and a shape are some that a tensor can have: its numbers could be counted in 64 bits, also where a
    dimension of none hides the others."""
    if not isinstance(its, dict) or not isinstance(its.get("dtype"), str) or not isinstance(its.get("shape"), list):
        return False
    shape = its["shape"]
    possible = len(shape) <= MAX_DIMS and all(_natural(n, MAX_SIZE) for n in shape)
    return possible and math.prod(n or 1 for n in shape) < MAX_SIZE


def _is_placed(parts: Any, files: dict[str, Any]) -> bool:
    """Whether a tensor's parts name files that there are: one that is read from nowhere would be whatever was in memory."""
    return isinstance(parts, list) and all(
        isinstance(part, list) and len(part) == 3 and isinstance(part[0], str) and part[0] in files for part in parts
    )


def _natural(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _number(value: Any) -> bool:
    return type(value) in (int, float)
