"""A cell's figures as people read them, for the terminal, the page and the picture alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainkit.units import human_bytes

NOTHING, SPACE = "–", "\N{NO-BREAK SPACE}"
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary")  # in the order of a step
COLUMNS = ("tokens/s", "speed", "ms/step", "MFU", "peak memory", "change", "loss", "difference", "status")

TALK = ("ranks", "efficiency", "a rank sends", "talking", "beside the rest", "waited")

AGAINST = ("speed", "memory", "loss difference", "")
WORSE = {"status": "no longer ok", "speed": "slower", "memory": "more memory", "loss": "another loss"}


def row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of `COLUMNS`."""
    return (
        _spread(cell),
        _show(cell["speed"], "{:.2f}×"),
        _show(cell["ms_per_step"], "{:,.0f}" if (cell["ms_per_step"] or 0) >= 100 else "{:.1f}"),
        _show(cell["mfu"], "{:.0%}"),
        NOTHING if cell["peak_memory_bytes"] is None else human_bytes(cell["peak_memory_bytes"]),
        percent(cell["memory_change"]),
        _show(cell["loss"], "{:.5f}"),
        difference(cell["loss_difference"]),
        cell["status"],
    )


def talk(cell: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The figures of `TALK`: of the step that was followed, how long ranks talked, how much of that went on beside the
    computation, and the share of the step that was waited for the rest. None: one rank, or not followed."""
    if not (found := cell["talk"]):
        return None
    sent, talked, waited = sum(one["bytes"] for one in found["sent"]), found["talked_s"], found["exposed_s"]
    return (
        str(cell["ranks"]),
        _show(cell["efficiency"], "{:.1%}"),
        human_bytes(sent),
        f"{1000 * talked:.3g}{SPACE}ms",
        _show(1 - waited / talked if talked else None, "{:.0%}"),
        _show(waited / found["seconds"] if found["seconds"] else None, "{:.0%}"),
    )


def against(cell: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The figures of `AGAINST`: now over then, and what is worse by more than the spread. None: there was no such cell."""
    if (found := cell.get("against")) is None:
        return None
    verdict = ", ".join(WORSE[word] for word in found["worse"]) or "no worse"
    ratios = (_show(found[figure], "{:.2f}×") for figure in ("speed", "memory"))
    return (*ratios, difference(found["loss_difference"]), verdict)


def against_what(document: Mapping[str, Any]) -> str:
    """Which earlier benchmark this one is compared with, and what makes them hard to compare."""
    there = document["against"]
    environment = there["environment"]
    said = f"Against {there['path']} of {environment.get('time', 'an unknown time')}"
    if there["elsewhere"]:
        said += f", on {environment.get('device')} with torch {environment.get('torch')}: not this machine"
    if missing := len(there["missing"]):
        said += f"; {missing} of its cells {'is' if missing == 1 else 'are'} not here"
    return said + "."


def percent(change: float | None) -> str:
    """`-0.648` -> `−64.8 %`."""
    if change is None:
        return NOTHING
    return "same" if abs(change) < 0.0005 else f"{change * 100:+.1f}{SPACE}%".replace("-", "−")


def difference(value: float | None) -> str:
    """A difference of losses: 0 where not one bit differs."""
    return NOTHING if value is None else "0" if value == 0 else f"{value:+.1e}".replace("-", "−")


def categories(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The kinds of memory that any cell has: the known ones first."""
    seen = {name for cell in cells for name, size in (cell["memory_by_category"] or {}).items() if size}
    return [name for name in CATEGORIES if name in seen] + sorted(seen - set(CATEGORIES))


def experiments(document: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cells under the title of each experiment."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in document["cells"]:
        found.setdefault(cell["experiment"], []).append(cell)
    return list(found.items())


def headline(cells: Sequence[Mapping[str, Any]]) -> str:
    """What the cells say, in a sentence: the one that takes least, and the fastest."""
    compared = [c for c in cells[1:] if c["memory_change"] is not None and c["speed"] is not None]
    if not compared:
        return ""
    first = cells[0]["name"]
    least, fastest = min(compared, key=lambda c: c["memory_change"]), max(compared, key=lambda c: c["speed"])
    said = []
    if least["memory_change"] < -0.0005:
        less = f"{-least['memory_change']:.1%}".replace("%", f"{SPACE}%")
        said.append(f"{least['name']} takes {less} less memory than {first} at {least['speed']:.2f} times its speed")
    if fastest["speed"] > 1.005 and fastest is not least:
        said.append(f"{fastest['name']} is the fastest, at {fastest['speed']:.2f} times the speed of {first}")
    return ("; ".join(said) + ".") if said else ""


def measured(document: Mapping[str, Any]) -> str:
    """How the figures came about, in a sentence or two."""
    settings = document["settings"]
    rounds, steps, warmup = settings["rounds"], settings["steps"], settings["warmup"]
    turns = f"{rounds} rounds in which the cells take turns" if rounds > 1 else "one round"
    spread = "; figures are medians over the rounds, ± half of what lies between the extremes" if rounds > 1 else ""
    timed = f"{_many(warmup, 'step')} of warm-up, {_many(steps, 'step')} timed"
    return (
        f"{turns}, every cell in a fresh process: {timed}{spread}. Peak memory is that of a step of its own after them, in "
        f"allocated bytes; the loss is that after {_many(warmup + steps, 'identical update')}."
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _spread(cell: Mapping[str, Any]) -> str:
    middle = cell["tokens_per_s"]
    if middle is None:
        return NOTHING
    half = (cell["tokens_per_s_max"] - cell["tokens_per_s_min"]) / 2
    return f"{middle:,.0f}" + (f" ±{half / middle:.0%}" if len(cell["rounds"]) > 1 else "")


def _show(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)
