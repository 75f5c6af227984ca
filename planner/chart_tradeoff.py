"""The report's trade-off: every proposal as a point, time against the largest memory share; the frontier as a line."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.compare import Comparison, Row
from planner.drawing import Dot, Drawing, Path, Shape, Text, clipped, nice_ticks
from planner.show import duration

WIDTH, HEIGHT = 960, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 16, 44
LABEL = 15
"""Height of a line of labels."""
SPREAD = 12.0
"""Points slower than this many times the fastest are left out: they would squeeze the others into a corner."""


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
    fastest = min(point.seconds for point in points)
    shown = [point for point in points if point.seconds <= SPREAD * fastest]
    left_out = [point.label for point in points if point.seconds > SPREAD * fastest and point.label]
    span = max(point.seconds for point in shown) * 1.04
    top = max(1.0, *(point.share for point in shown))
    scale = _Scale((WIDTH - LEFT - RIGHT) / span, (HEIGHT - TOP - BOTTOM) / top)
    shapes = [*_axes(scale, span, top), *_line(scale, frontier), *_dots(scale, shown), *_labels(scale, shown)]
    described = "; ".join(f"{p.label}: {duration(p.seconds)}, {p.share:.0%} of memory" for p in shown if p.label)
    title = "Time against memory: lower and further left is better"
    if left_out:
        title += f" (far off to the right: {', '.join(left_out)})"
    return Drawing("tradeoff", title, described, WIDTH, HEIGHT, shapes)


@dataclass(frozen=True, slots=True)
class _Scale:
    per_second: float
    per_share: float

    def x(self, seconds: float) -> float:
        return LEFT + seconds * self.per_second

    def y(self, share: float) -> float:
        return HEIGHT - BOTTOM - share * self.per_share


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


def _axes(scale: _Scale, span: float, top: float) -> list[Shape]:
    shapes: list[Shape] = []
    floor = HEIGHT - BOTTOM
    for tick in nice_ticks(span, count=6):
        x = scale.x(tick)
        shapes.append(Path(f"M{x:.1f} {TOP}V{floor}", "grid"))
        shapes.append(Text(x, floor + 18, duration(tick) if tick else "0", "label quiet small", "middle"))
    for tick in nice_ticks(top, count=5):
        y = scale.y(tick)
        shapes.append(Path(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", "grid"))
        shapes.append(Text(LEFT - 8, y + 4, f"{tick:.0%}", "label quiet small", "end"))
    shapes.append(Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "time", "label quiet small", "middle"))
    shapes.append(Text(4, TOP + 2, "fullest device", "label quiet small"))
    return shapes


def _line(scale: _Scale, frontier: Sequence[Point]) -> list[Shape]:
    ordered = sorted(frontier, key=lambda point: (point.seconds, -point.share))
    if len(ordered) < 2:
        return []
    data = f"M{scale.x(ordered[0].seconds):.1f} {scale.y(ordered[0].share):.1f}"
    for point in ordered[1:]:  # a plan between two points of the frontier is no better than the one on the left
        data += f"H{scale.x(point.seconds):.1f}V{scale.y(point.share):.1f}"
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
    """Labels to the right of their points, pushed down where two would touch."""
    placed: list[tuple[float, float, float]] = []
    shapes: list[Shape] = []
    for point in sorted((p for p in points if p.label), key=lambda p: (-p.share, p.seconds)):
        x, y = scale.x(point.seconds) + 10, scale.y(point.share) + 4
        text = clipped(point.label, WIDTH - x)
        width = len(text) * 6.6
        while any(abs(y - other_y) < LABEL and x < end and x + width > start for start, end, other_y in placed):
            y += 3
        placed.append((x, x + width, y))
        shapes.append(Text(x, y, text, "label small", title=point.label))
    return shapes
