"""Where names go beside the points of a picture, so that none lies on another name or on a point. Lengths in pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GAP, LINE, RADIUS = 11.0, 16.0, 7.0
FARTHEST = 6  # lines up or down


@dataclass(frozen=True)
class Label:
    """A text's middle line `y`, and the `x` of its start, or of its end where `anchor` is `end`."""

    x: float
    y: float
    anchor: str
    width: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, top, bottom."""
        left = self.x if self.anchor == "start" else self.x - self.width
        return left, left + self.width, self.y - LINE / 2, self.y + LINE / 2


def place(points: Sequence[tuple[float, float]], widths: Sequence[float], width: float, height: float) -> list[Label]:
    """A label a point, `widths` long, inside `width` × `height` where that is possible: the nearest free place, the
    rightmost points first, which have least choice."""
    order = sorted(range(len(points)), key=lambda i: -points[i][0])
    placed: dict[int, Label] = {}
    for i in order:
        taken = [label.box for label in placed.values()]
        taken += [(x - RADIUS, x + RADIUS, y - RADIUS, y + RADIUS) for x, y in points]
        candidates = list(_around(*points[i], widths[i]))
        inside = [c for c in candidates if c.box[0] >= 0 and c.box[1] <= width and c.box[2] >= 0 and c.box[3] <= height]
        placed[i] = min(inside or candidates, key=lambda label: sum(_overlap(label.box, box) for box in taken))
    return [placed[i] for i in range(len(points))]


def _around(x: float, y: float, width: float) -> Iterator[Label]:
    """The places beside a point, the nearest first."""
    for lines in range(FARTHEST + 1):
        for sign in (1, -1) if lines else (1,):
            yield Label(x + GAP, y + sign * lines * LINE, "start", width)
            yield Label(x - GAP, y + sign * lines * LINE, "end", width)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))
