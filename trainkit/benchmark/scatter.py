"""Throughput against peak memory as SVG, drawn by a few lines of our own: a page then needs nothing from anywhere."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from trainkit.benchmark.labels import LINE, place

LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 44
CHARACTER = 7.2  # pixels, of a label
GIB, MIB = 1 << 30, 1 << 20


def scatter(cells: Sequence[Mapping[str, Any]], width: int, height: int) -> str:
    """A point a cell that has both figures, the first one hollow; a line joins those that no other cell beats in both.

    Text and lines take their colours from the page's classes.
    """
    points = [c for c in cells if c["peak_memory_bytes"] and c["tokens_per_s"]]
    if not points:
        return ""
    unit, name = (GIB, "GiB") if max(c["peak_memory_bytes"] for c in points) >= GIB else (MIB, "MiB")
    xs = [c["peak_memory_bytes"] / unit for c in points]
    ys = [c["tokens_per_s"] for c in points]
    x_ticks, y_ticks = ticks(max(xs), 6 if width > 500 else 4), ticks(max(ys), 5)

    def at(x: float, y: float) -> tuple[float, float]:
        across = x / x_ticks[-1] * (width - LEFT - RIGHT)
        return LEFT + across, height - BOTTOM - y / y_ticks[-1] * (height - TOP - BOTTOM)

    places = [at(x, y) for x, y in zip(xs, ys)]
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="tokens a second against peak memory">',
        *_axes(x_ticks, y_ticks, at, f"peak memory, {name}", width, height),
        _frontier(places),
        *_points(points, places, width, height),
        "</svg>",
    ]
    return "\n".join(parts)


def ticks(largest: float, most: int) -> list[float]:
    """Round numbers from 0 to just beyond `largest`, at most `most` steps."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest * 1.06 / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    return [i * step for i in range(math.ceil(largest * 1.06 / step) + 1)]


def best(places: Sequence[tuple[float, float]]) -> list[int]:
    """The points that none is both left of and above, from the left: which take least for their speed."""
    order = sorted(range(len(places)), key=lambda i: (places[i][0], places[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or places[i][1] < places[kept[-1]][1]:
            kept.append(i)
    return kept


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], at: Any, x_name: str, width: int, height: int
) -> Iterator[str]:
    for y in y_ticks:
        _, py = at(0, y)
        yield f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{_number(y)}</text>'
    for x in x_ticks:
        px, _ = at(x, 0)
        yield f'<text class="tick" x="{px:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{_number(x)}</text>'
    yield f'<text class="axis" x="{LEFT - 54}" y="14">tokens a second</text>'
    yield f'<text class="axis" x="{width - RIGHT}" y="{height - 6}" text-anchor="end">{x_name}</text>'


def _frontier(places: Sequence[tuple[float, float]]) -> str:
    line = " ".join(f"{places[i][0]:.1f},{places[i][1]:.1f}" for i in best(places))
    return f'<polyline class="frontier" points="{line}"/>'


def _points(
    cells: Sequence[Mapping[str, Any]], places: Sequence[tuple[float, float]], width: int, height: int
) -> Iterator[str]:
    names = [escape(cell["name"]) for cell in cells]
    labels = place(places, [len(cell["name"]) * CHARACTER for cell in cells], width, height - BOTTOM)
    for (x, y), label in zip(places, labels):
        if abs(label.y - y) > LINE / 2:
            yield f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{label.x:.1f}" y2="{label.y:.1f}"/>'
    for i, ((x, y), label, name) in enumerate(zip(places, labels, names)):
        kind = "point" if i else "point first"
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{name}</title></circle>'
        yield f'<text class="label" x="{label.x:.1f}" y="{label.y + 4:.1f}" text-anchor="{label.anchor}">{name}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
