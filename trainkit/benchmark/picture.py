"""The figures as a PNG, drawn by matplotlib: the extra `plot`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.benchmark import words
from trainkit.benchmark.labels import LINE as HEIGHT
from trainkit.benchmark.labels import place
from trainkit.errors import UserError

COLOURS = ("#3b6fc9", "#d97b29", "#7d58b5", "#2a9670", "#8d96a1", "#b0486f")
INK, SOFT, LINE = "#1d2127", "#5c6570", "#e3e5e8"
LEADER = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
MIB, DPI = 1 << 20, 110
CHARACTER = 8.4  # pixels, of a name


def can_draw() -> bool:
    """Whether there is a matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def check() -> None:
    """Raise UserError where there is none."""
    if not can_draw():
        raise UserError("--png needs matplotlib: pip install 'trainkit[plot]' (--html needs nothing)")


def draw(document: Mapping[str, Any], path: Path) -> None:
    """An experiment a row: throughput against peak memory, and memory by category."""
    from matplotlib.figure import Figure

    experiments = words.experiments(document)
    heights = [1.6 + 0.42 * max(len(cells), 5) for _, cells in experiments]
    figure = Figure(figsize=(12, sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(experiments), 2, squeeze=False, height_ratios=heights)
    for (title, cells), (left, right) in zip(experiments, axes):
        _points(left, cells)
        _bars(right, cells)
        if title:
            left.set_title(title, loc="left", fontsize=11, color=INK)
    figure.draw_without_rendering()  # places everything, so that the names can be placed
    for (_, cells), (left, _) in zip(experiments, axes):
        _names(left, cells)
    figure.savefig(path, dpi=figure.dpi, format="png")


def _points(axis: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    points = _measured(cells)
    for i, cell in enumerate(points):
        x, y = cell["peak_memory_bytes"] / MIB, cell["tokens_per_s"]
        axis.plot(x, y, "o", color=COLOURS[0], markerfacecolor=COLOURS[0] if i else "white", markersize=8)
    axis.set_xlabel("peak memory, MiB", color=SOFT)
    axis.set_ylabel("tokens a second", color=SOFT)
    if points:
        axis.set_xlim(0, max(c["peak_memory_bytes"] for c in points) / MIB * 1.08)
        axis.set_ylim(0, max(c["tokens_per_s"] for c in points) * 1.12)
    _plain(axis)


def _names(axis: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    points = _measured(cells)
    box, to_pixels = axis.bbox, axis.transData.transform
    places = [to_pixels((c["peak_memory_bytes"] / MIB, c["tokens_per_s"])) for c in points]
    inside = [(x - box.x0, y - box.y0) for x, y in places]
    labels = place(inside, [len(c["name"]) * CHARACTER for c in points], box.width, box.height)
    for cell, label, (x, y) in zip(points, labels, inside):
        said = {"ha": "left" if label.anchor == "start" else "right", "va": "center", "fontsize": 9, "color": INK}
        axis.annotate(cell["name"], (label.x, label.y), xycoords="axes pixels", **said)
        if abs(label.y - y) > HEIGHT / 2:
            axis.annotate("", (x, y), (label.x, label.y), xycoords="axes pixels", arrowprops=LEADER)


def _measured(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [c for c in cells if c["peak_memory_bytes"] and c["tokens_per_s"]]


def _bars(axis: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    names, rows = words.categories(cells), range(len(cells))
    lengths = [0.0] * len(cells)
    for i, name in enumerate(names):
        widths = [(c["memory_by_category"] or {}).get(name, 0) / MIB for c in cells]
        axis.barh(rows, widths, left=lengths, color=COLOURS[i % len(COLOURS)], label=name, height=0.62)
        lengths = [a + b for a, b in zip(lengths, widths)]
    for row, (cell, length) in enumerate(zip(cells, lengths)):
        said = words.percent(cell["memory_change"]) if cell["memory_change"] else cell["status"] if not length else ""
        axis.annotate(
            said, (length, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=SOFT
        )
    axis.set_yticks(rows, [c["name"] for c in cells])
    axis.invert_yaxis()
    axis.set_xlabel("memory at the peak, MiB", color=SOFT)
    axis.margins(x=0.15)
    if names:
        axis.legend(frameon=False, fontsize=9, labelcolor=SOFT)
    _plain(axis)
    axis.grid(visible=False, axis="y")


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(LINE)
    axis.tick_params(colors=SOFT, length=0)
    axis.grid(color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
