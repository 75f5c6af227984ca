"""The report's trade-off: every proposal as a point, time against the largest memory share; the frontier as a line."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner.report.drawing import CHARACTER_WIDTH, Dot, Drawing, Path, Shape, Text, clipped, log_ticks, nice_ticks
from planner.rivals.compare import Comparison, Row
from planner.show.compare import TIME_NAMES
from planner.show.words import duration

WIDTH, HEIGHT = 960, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 150, 36, 44
LABEL, SIZE = 15, 11
"""Height of a line of labels, and of its letters."""
ROOM = 1.12
"""Free space on either side of the points, as a factor: the axis of time is logarithmic."""


@dataclass(frozen=True, slots=True)
class Point:
    """Time in seconds, memory as a share of the budget."""

    seconds: float
    share: float
    label: str
    css: str = "point"


def tradeoff_drawing(found: Comparison, *, frontier: Sequence[Point] = ()) -> Drawing | None:
    """Return the points of all rows that fit, and the frontier if there is one; None with nothing to show."""
    points = _merged([*_row_points(found), *frontier])
    if not points:
        return None
    scale = _Scale(
        min(point.seconds for point in points) / ROOM,
        max(point.seconds for point in points) * ROOM,
        max(1.0, *(point.share for point in points)),
    )
    shapes = [
        *_axes(scale, TIME_NAMES[found.objective]),
        *_line(scale, frontier),
        *_dots(scale, points),
        *_labels(scale, points),
    ]
    described = "; ".join(f"{p.label}: {duration(p.seconds)}, {p.share:.1%} of memory" for p in points if p.label)
    title = "Time against the memory share of the fullest device; further down and to the left is better"
    return Drawing("tradeoff", title, described, WIDTH, HEIGHT, shapes)


@dataclass(frozen=True, slots=True)
class _Scale:
    """The axes: time from `first` to `last` seconds, logarithmic; shares from 0 to `top`."""

    first: float
    last: float
    top: float

    def x(self, seconds: float) -> float:
        place = math.log(seconds / self.first) / math.log(self.last / self.first)
        return LEFT + place * (WIDTH - LEFT - RIGHT)

    def y(self, share: float) -> float:
        return HEIGHT - BOTTOM - share / self.top * (HEIGHT - TOP - BOTTOM)


def _row_points(found: Comparison) -> list[Point]:
    points = []
    for row in found.rows:
        seconds, share = found.seconds(row), row.max_share
        if row.fits and seconds is not None and share is not None:
            points.append(Point(seconds, share, row.name, _css(row)))
    return points


def _css(row: Row) -> str:
    return {"strategy": "point ours", "rule": "point theirs", "partition": "point given"}[row.kind]


def _merged(points: Sequence[Point]) -> list[Point]:
    """Points at the same place share a label; the first one's class counts."""
    places: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        places.setdefault((float(f"{point.seconds:.6g}"), float(f"{point.share:.6g}")), []).append(point)
    merged = []
    for group in places.values():
        label = ", ".join(dict.fromkeys(point.label for point in group if point.label))
        merged.append(Point(group[0].seconds, group[0].share, label, group[0].css))
    return merged


def _axes(scale: _Scale, what: str) -> list[Shape]:
    shapes: list[Shape] = []
    floor = HEIGHT - BOTTOM
    for tick in log_ticks(scale.first, scale.last):
        x = scale.x(tick)
        shapes.append(Path(f"M{x:.1f} {TOP}V{floor}", "grid"))
        shapes.append(Text(x, floor + 18, duration(tick), "label quiet small", "middle"))
    for tick in nice_ticks(scale.top, count=5):
        y = scale.y(tick)
        shapes.append(Path(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", "grid"))
        shapes.append(Text(LEFT - 8, y + 4, f"{tick:.0%}", "label quiet small", "end"))
    shapes.append(Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, f"{what} (logarithmic)", "label quiet small", "middle"))
    shapes.append(Text(LEFT - 8, 12, "fullest device", "label quiet small"))
    return shapes


def _line(scale: _Scale, frontier: Sequence[Point]) -> list[Shape]:
    ordered = sorted(frontier, key=lambda point: (point.seconds, -point.share))
    if len(ordered) < 2:
        return []
    data = f"M{scale.x(ordered[0].seconds):.1f} {scale.y(ordered[0].share):.1f}"
    for point in ordered[1:]:
        # No plan with this share is faster than this point; with a little more share nobody looked.
        data += f"V{scale.y(point.share):.1f}H{scale.x(point.seconds):.1f}"
    return [Path(data, "frontier", "no plan lies below and left of this line")]


def _dots(scale: _Scale, points: Sequence[Point]) -> list[Shape]:
    return [
        Dot(
            scale.x(point.seconds), scale.y(point.share), 5 if point.label else 3, point.css,
            f"{point.label or 'on the frontier'}: {duration(point.seconds)}, {point.share:.1%} of the fullest device",
        )
        for point in points
    ]  # fmt: skip


def _labels(scale: _Scale, points: Sequence[Point]) -> list[Shape]:
    """A label beside each point, where it touches no dot, no other label and no axis."""
    taken = [_Area(scale.x(p.seconds) - 6, scale.x(p.seconds) + 6, scale.y(p.share) + 4) for p in points]
    shapes: list[Shape] = []
    for point in sorted((p for p in points if p.label), key=lambda p: (-p.share, p.seconds)):
        options = list(_places(scale.x(point.seconds), scale.y(point.share) + 4, point.label))
        area = next((o for o in options if not any(o.touches(other) for other in taken)), options[0])
        taken.append(area)
        text = clipped(point.label, area.right - area.left, size=SIZE)
        shapes.append(Text(area.left, area.y, text, "label small", title=point.label))
    return shapes


def _places(x: float, y: float, label: str) -> Iterator["_Area"]:
    """Yield where a label may stand: right of its point or left of it, then higher and lower."""
    width = (len(label) + 1) * CHARACTER_WIDTH * SIZE / 12
    right = _Area(x + 10, min(x + 10 + width, WIDTH), y)
    left = _Area(x - 10 - width, x - 10, y)
    sides = [side for side in (right, left) if side.right - side.left >= width and side.left >= LEFT] or [right]
    for move in (0, *(sign * step for step in range(13, 105, 13) for sign in (1, -1))):
        yield from (replace(side, y=y + move) for side in sides if TOP - 12 <= y + move <= HEIGHT - BOTTOM or not move)


@dataclass(frozen=True, slots=True)
class _Area:
    """The place of a line of text: from left to right, and its baseline."""

    left: float
    right: float
    y: float

    def touches(self, other: "_Area") -> bool:
        return abs(self.y - other.y) < LABEL - 3 and self.left < other.right and other.left < self.right
