"""The bytes that are allocated, over time, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from trainkit.profile.allocations import Allocations
from trainkit.profile.blocks import ACTIVATIONS, CATEGORIES, GRADIENTS, PARAMETERS, STATES, TEMPORARY, Phase
from trainkit.units import human_bytes

# Okabe and Ito's colours, which people who do not tell red from green tell apart (https://jfly.uni-koeln.de/color)
COLOURS = {  # from the bottom: what stays comes first
    PARAMETERS: "#0072B2",
    STATES: "#009E73",
    GRADIENTS: "#D55E00",
    ACTIVATIONS: "#56B4E9",
    TEMPORARY: "#F0E442",
}
SHADES = {"forward": "#f4f4f4", "backward": "#dedede", "optimizer": "#c4c4c4"}
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
WIDE, NARROW = 7.5, 1.7  # inches of a panel of steps, and of one of another phase
COLUMNS = 1500  # points of a panel: more cannot be seen
HORIZONTAL, VERTICAL, PEAK = 0.75, 0.32, 1.3  # inches that a label needs


def draw(path: Path, seen: Sequence[Allocations]) -> None:
    """Write the picture of what was seen."""
    figure(seen).savefig(path, dpi=120)


def figure(seen: Sequence[Allocations]) -> Figure:
    """One panel for the steps, and a narrow one for each other phase that was looked at."""
    widths = [WIDE if any(p.step >= 0 for p in it.phases) else NARROW for it in seen]
    whole = Figure(figsize=(2.6 + sum(widths), 5), layout="constrained")
    axes = whole.subplots(1, len(seen), sharey=True, squeeze=False, width_ratios=widths)[0]
    top = max(it.peak for it in seen)
    unit, scale = next((unit, size) for unit, size in UNITS.items() if top >= size or size == 1)
    for axis, it, width in zip(axes, seen, widths, strict=True):
        _panel(axis, it, scale, width)
        axis.set_ylim(0, top / scale * 1.3)
    axes[0].set_ylabel(f"allocated, {unit}")
    colours = [Patch(color=COLOURS[category], label=category) for category in reversed(COLOURS)]
    shades = [Patch(facecolor=shade, edgecolor="#999999", label=phase) for phase, shade in SHADES.items()]
    whole.legend(handles=[*colours, *shades], loc="outside right upper", frameon=False, fontsize=9)
    return whole


def _panel(axis: Axes, it: Allocations, scale: int, width: float) -> None:
    begin, end = it.line[0][0], it.line[-1][0]
    points = _thinned(it.line)
    ms = [(ns - begin) / 1e6 for ns, _ in points]
    order = [CATEGORIES.index(category) for category in COLOURS]
    stacked = [[levels[i] / scale for _, levels in points] for i in order]
    axis.stackplot(ms, stacked, colors=list(COLOURS.values()), step="post", linewidth=0)
    for phase in it.phases:
        for a, b in phase.spans:
            axis.axvspan((a - begin) / 1e6, (b - begin) / 1e6, color=SHADES.get(phase.phase, "white"), zorder=-1, lw=0)
        _label(axis, phase, begin, width / max(end - begin, 1))
    at, total = max(((ns, sum(levels)) for ns, levels in it.line), key=lambda point: point[1])
    axis.plot([(at - begin) / 1e6], [total / scale], "o", color="black", markersize=4)
    share = (at - begin) / max(end - begin, 1)
    margin = PEAK / width / 2  # so that it stays inside
    axis.annotate(
        f"peak {human_bytes(total)}",
        (min(max(share, margin), 1 - margin), total / scale),
        xycoords=axis.get_yaxis_transform(),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        fontweight="bold",
    )
    for step in sorted({p.step for p in it.phases if p.step >= 0}):
        spans = [span for p in it.phases if p.step == step for span in p.spans]
        middle = (min(a for a, _ in spans) + max(b for _, b in spans)) / 2
        axis.text((middle - begin) / 1e6, 1.01, f"step {step}", transform=axis.get_xaxis_transform(), ha="center")
    axis.set_xlim(0, max((end - begin) / 1e6, 1e-6))
    axis.set_xlabel("ms, slowed by looking" if width == WIDE else "ms")
    axis.spines[["top", "right"]].set_visible(False)


def _label(axis: Axes, phase: Phase, begin: int, inches_per_ns: float) -> None:
    """A phase's name and peak over the longest of its spans, where there is room for them."""
    a, b = max(phase.spans, key=lambda span: span[1] - span[0])
    room = (b - a) * inches_per_ns
    if phase.phase == "outside" or room < VERTICAL:
        return
    axis.text(
        ((a + b) / 2 - begin) / 1e6,
        0.985,
        f"{phase.phase}\n{human_bytes(phase.peak)}",
        transform=axis.get_xaxis_transform(),
        ha="center",
        va="top",
        rotation=0 if room >= HORIZONTAL else 90,
        fontsize=8,
    )


def _thinned(line: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """The highest and the last point of every column that can be told apart."""
    begin, end = line[0][0], line[-1][0]
    columns: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for point in line:
        columns.setdefault((point[0] - begin) * COLUMNS // max(end - begin, 1), []).append(point)
    kept = []
    for points in columns.values():
        highest = max(points, key=lambda point: sum(point[1]))
        kept += [highest] if highest is points[-1] else [highest, points[-1]]
    return kept
