"""Flat vector drawings as plain data: what the report's template turns into inline SVG.

Shapes carry a class for the style sheet, never a colour, so that one drawing reads in light, in dark and in print.
Texts are escaped by the template. Coordinates are user units (pixels at 100 %), y downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

CHARACTER_WIDTH = 6.6
"""A character of the drawings' 12-unit text, generously."""


@dataclass(frozen=True, slots=True)
class Rect:
    """A rectangle; `title` is what a pointer resting on it shows."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""
    radius: float = 0.0
    kind: str = "rect"


@dataclass(frozen=True, slots=True)
class Path:
    """A line or curve in SVG path syntax; `has_arrow` ends it with an arrowhead."""

    data: str
    css: str
    title: str = ""
    has_arrow: bool = False
    kind: str = "path"


@dataclass(frozen=True, slots=True)
class Dot:
    """A circle."""

    x: float
    y: float
    radius: float
    css: str
    title: str = ""
    kind: str = "dot"


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    css: str = "label"
    anchor: str = "start"
    title: str = ""
    kind: str = "text"


Shape = Rect | Path | Dot | Text


@dataclass(frozen=True, slots=True)
class Drawing:
    """Shapes on a canvas, with the words a screen reader says instead."""

    name: str
    """Unique on its page; the ids of title and description are made from it."""
    title: str
    description: str
    width: float
    height: float
    shapes: Sequence[Shape] = field(default_factory=tuple)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals, and no minus in front of zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def clipped(text: str, width: float, *, size: float = 12.0) -> str:
    """Return `text`, cut with an ellipsis to what fits into `width` units at a text size."""
    most = max(2, int(width / CHARACTER_WIDTH * 12.0 / size))
    return text if len(text) <= most else text[: most - 1] + "…"


def nice_ticks(maximum: float, *, count: int) -> list[float]:
    """Return round values from 0 to at most `maximum`, about `count` of them, one, two or five times a power of ten.

    Example:
        >>> nice_ticks(37.0, count=5)
        [0.0, 10.0, 20.0, 30.0]
    """
    if maximum <= 0:
        return [0.0]
    rough = maximum / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [i * step for i in range(int(maximum / step * 1.000001) + 1)]


def log_ticks(first: float, last: float) -> list[float]:
    """Return the values of one, two or five times a power of ten from `first` to `last`, both positive.

    Example:
        >>> log_ticks(3.0, 60.0)
        [5.0, 10.0, 20.0, 50.0]
    """
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if first <= tick <= last]
