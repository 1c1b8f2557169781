"""This benchmark beside an earlier one: ratios, and what is worse by more than the spread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.errors import UserError
from trainkit.strict import one_line, parse_json, read_file, reason

MAX_BYTES = 64 << 20
MEMORY, LOSS = 0.01, 1e-4  # of the earlier figure: allocations repeat, and so does a loss on the same kind of machine
_NUMBERS = ("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max", "ms_per_step", "peak_memory_bytes", "loss")


def read(path: Path) -> dict[str, Any]:
    """What an earlier `--json` wrote.

    Raises:
        UserError: the file is missing, or is none of those.
    """
    try:
        found = parse_json(read_file(path, MAX_BYTES), max_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"--against {path} cannot be read: {one_line(reason(error))}") from error
    cells = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(cells, list) or not all(_is_cell(cell) for cell in cells):
        raise UserError(f"--against {path} is not what `trainkit benchmark --json FILE` writes")
    return {"cells": cells, "environment": found.get("environment") or {}, "path": str(path)}


def compare(document: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Give every cell that the earlier benchmark has, by its overrides, an `against`: ratios of now to then, and which of
    them are `worse`. `document["against"]` says what it was compared with, and which cells are missing now.

    Speed is worse where the fastest round is slower than the slowest one then was: with one round there is no spread, and
    nothing is said. Memory is worse above 1 %, loss where it differs by more than a ten-thousandth.
    """
    then = {_key(cell): cell for cell in earlier["cells"]}
    for cell in document["cells"]:
        if (old := then.pop(_key(cell), None)) is not None:
            cell["against"] = _compared(cell, old)
    machine = {"device", "torch"}
    document["against"] = {
        "path": earlier["path"],
        "environment": earlier["environment"],
        "elsewhere": any(earlier["environment"].get(k) != document["environment"].get(k) for k in machine),
        "missing": [cell["overrides"] for cell in then.values()],
    }


def _compared(cell: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    speed, memory = _ratio(cell, old, "tokens_per_s"), _ratio(cell, old, "peak_memory_bytes")
    both = cell["loss"] is not None and old["loss"] is not None
    loss = cell["loss"] - old["loss"] if both else None
    worse = []
    if old["status"] == "ok" != cell["status"]:
        worse.append("status")
    several = len(cell["rounds"]) > 1 and len(old["rounds"]) > 1
    if speed is not None and several and cell["tokens_per_s_max"] < old["tokens_per_s_min"]:
        worse.append("speed")
    if memory is not None and memory > 1 + MEMORY:
        worse.append("memory")
    if loss is not None and abs(loss) > LOSS * abs(old["loss"]):
        worse.append("loss")
    return {"speed": speed, "memory": memory, "loss_difference": loss, "worse": worse}


def _ratio(cell: Mapping[str, Any], old: Mapping[str, Any], figure: str) -> float | None:
    return cell[figure] / old[figure] if cell[figure] is not None and old[figure] else None


def _key(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(cell["overrides"]))


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("rounds"), list):
        return False
    words = cell.get("overrides")
    numbers = all(n in cell and isinstance(cell[n], int | float | None) for n in _NUMBERS)
    return isinstance(words, list) and all(isinstance(w, str) for w in words) and "status" in cell and numbers
