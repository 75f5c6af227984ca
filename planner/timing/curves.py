"""Measured curves: interpolation inside what was measured, the roofline's growth beyond it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

Point = tuple[float, ...]
Model = Callable[[Point], float]
"""A rough time in seconds at a point; only its growth is used."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A time read off a curve, and whether the point lies beyond what was measured."""

    seconds: float
    is_extrapolated: bool = False


def estimate(rows: Sequence[tuple[float, ...]], *, point: Point, model: Model) -> Estimate:
    """Read a measured table at `point`.

    Along each coordinate the values are made non-decreasing (a larger batch or context never costs less; a measured dip
    is noise) and interpolated linearly. Beyond either end the nearest value is scaled by the growth of `model`.

    Args:
        rows: (coordinate, ..., seconds), in any order, at least one; all coordinates numeric.
        point: one value per coordinate.
        model: roofline time at a point, positive.

    Example:
        >>> estimate([(128, 1.0), (256, 2.0)], point=(192,), model=lambda p: 1.0).seconds
        1.5
    """
    return _at(sorted(rows), depth=0, point=point, model=model)


def _at(rows: Sequence[tuple[float, ...]], *, depth: int, point: Point, model: Model) -> Estimate:
    if depth == len(point):
        return Estimate(max(row[-1] for row in rows))
    knots: list[tuple[float, Estimate]] = []
    for key, group in groupby(rows, key=lambda row: row[depth]):
        inner_point = (*point[:depth], key, *point[depth + 1 :])
        inner = _at(list(group), depth=depth + 1, point=inner_point, model=model)
        floor = knots[-1][1].seconds if knots else 0.0
        knots.append((key, Estimate(max(inner.seconds, floor), inner.is_extrapolated)))
    return _between(knots, depth=depth, point=point, model=model)


def _between(knots: Sequence[tuple[float, Estimate]], *, depth: int, point: Point, model: Model) -> Estimate:
    x = point[depth]
    measured = dict(knots).get(x)
    if measured is not None:
        return measured
    for (x0, low), (x1, high) in pairwise(knots):
        if x0 < x < x1:
            share = (x - x0) / (x1 - x0)
            seconds = low.seconds + share * (high.seconds - low.seconds)
            return Estimate(seconds, low.is_extrapolated or high.is_extrapolated)
    key, nearest = knots[0] if x < knots[0][0] else knots[-1]
    there = model((*point[:depth], key, *point[depth + 1 :]))
    return Estimate(nearest.seconds * model(point) / there, is_extrapolated=True)
