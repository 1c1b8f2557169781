"""The figures of a benchmark, as one JSON document: what every table, page and picture shows."""

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from trainkit import __version__
from trainkit.benchmark.rounds import Measured, Settings

FORMAT = 1


def document(measured: Sequence[Measured], settings: Settings, *, command: str) -> dict[str, Any]:
    """All that is known, with the cells in their order. A figure that is not known is null.

    What is compared with the first cell is compared with the first of the same experiment: `speed` (tokens a second over
    its own, the median over rounds of the ratio within a round), `memory_change` (-0.65: 65 % less), `loss_difference`.
    """
    cells = []
    for it in measured:
        first = next(other for other in measured if other.experiment is it.experiment)
        cells.append(_cell(it, first, settings))
    whole = {
        "format": FORMAT,
        "command": command,
        "environment": _environment(measured),
        "settings": asdict(settings),
        "cells": cells,
    }
    found: dict[str, Any] = _without_nan(whole)
    return found


def _cell(it: Measured, first: Measured, settings: Settings) -> dict[str, Any]:
    rounds = [_round(found) for found in it.rounds if found["status"] == "ok"]
    bad = next((found for found in it.rounds if found["status"] != "ok"), None)
    opening = it.rounds[0] if rounds else {}
    memory, base_memory = _peak(it), _peak(first)
    loss, base_loss = opening.get("loss"), _loss(first)
    if it.cell.run is not None and not it.rounds:
        bad = {"status": "failed", "error": "not run: stopped before its turn"}
    error = it.cell.refusal or (bad or {}).get("error")
    if loss is not None and not math.isfinite(loss):
        error = error or f"the loss is {loss}"
    status = "refused" if it.cell.run is None else bad["status"] if bad else "ok"
    return {
        "experiment": it.experiment.title,
        "name": it.cell.name,
        "overrides": list(it.cell.overrides),
        "memory": it.cell.memory,
        "status": status,
        "error": error,
        "log": (bad or {}).get("log"),
        **_spread("tokens_per_s", rounds),
        **_spread("ms_per_step", rounds),
        "mfu": _median([found["mfu"] for found in rounds]),
        "speed": _paired(it, first),
        "efficiency": _efficiency(it, first),
        "talk": opening.get("talk"),
        "peak_memory_bytes": memory,
        "memory_change": memory / base_memory - 1 if memory and base_memory else None,
        "memory_by_category": opening.get("memory", {}).get("by_category"),
        "memory_by_phase": opening.get("memory", {}).get("by_phase"),
        "peak_rss_growth_bytes": _median([found["peak_rss_growth_bytes"] for found in rounds]),
        "cuda_peak_allocated_bytes": opening.get("cuda_peak_allocated_bytes"),
        "cuda_peak_reserved_bytes": opening.get("cuda_peak_reserved_bytes"),
        "updates": settings.warmup + settings.steps,
        "loss": loss,
        "loss_difference": loss - base_loss if loss is not None and base_loss is not None else None,
        "losses": opening.get("losses"),
        "strategies": it.cell.run.memory.describe() if it.cell.run else None,
        **{key: opening.get(key) for key in ("parameters", "tokens_per_step", "ranks", "device", "data")},
        "rounds": rounds,
    }


def _round(found: dict[str, Any]) -> dict[str, float]:
    seconds = found["seconds"] / found["steps"]
    tokens_per_s = found["tokens_per_step"] / seconds
    return {
        "tokens_per_s": tokens_per_s,
        "ms_per_step": 1000 * seconds,
        "mfu": tokens_per_s * found["flops_per_token"] / (found["peak_flops"] * found["ranks"]),
        "peak_flops": found["peak_flops"],
        "peak_rss_growth_bytes": found["peak_rss_growth_bytes"],
    }


def _spread(name: str, rounds: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The median of a figure over the rounds, the extremes, and the median distance from the median."""
    found = [each[name] for each in rounds]
    middle = _median(found)
    mad = _median([abs(value - middle) for value in found]) if middle is not None else None
    extremes = {f"{name}_min": min(found, default=None), f"{name}_max": max(found, default=None)}
    return {name: middle, **extremes, f"{name}_mad": mad}


def _paired(it: Measured, first: Measured) -> float | None:
    """How many times as fast as `first`: rounds lie close together in time, so that a machine's moods cancel out."""
    both = [
        (theirs["seconds"] / theirs["tokens_per_step"]) / (ours["seconds"] / ours["tokens_per_step"])
        for ours, theirs in zip(it.rounds, first.rounds)
        if ours["status"] == theirs["status"] == "ok"
    ]
    return _median(both)


def _efficiency(it: Measured, first: Measured) -> float | None:
    """Tokens a second and rank over those of `first`; of a cell with no more ranks there is nothing to say."""
    ranks, before = (one.rounds[0].get("ranks", 1) if one.rounds else 1 for one in (it, first))
    speed = _paired(it, first)
    return None if speed is None or ranks == before else speed * before / ranks


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _peak(it: Measured) -> int | None:
    return it.rounds[0].get("memory", {}).get("peak") if it.rounds else None


def _loss(it: Measured) -> float | None:
    return it.rounds[0].get("loss") if it.rounds else None


def _environment(measured: Sequence[Measured]) -> dict[str, Any]:
    devices = dict.fromkeys(found["device"] for it in measured for found in it.rounds if "device" in found)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": ", ".join(devices) or None,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "trainkit": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _without_nan(value: Any) -> Any:
    """JSON has no word for NaN or infinity: null."""
    if isinstance(value, dict):
        return {key: _without_nan(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_without_nan(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
