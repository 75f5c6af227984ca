"""Seconds of one unit on one device: its measured curve where there is one, else the roofline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from planner.timing.roofline import Work, roofline_seconds
from plans.cluster import Device, Timings
from plans.profile import ModelProfile, UnitProfile
from plans.workload import Workload

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


Table = tuple[tuple[float, ...], ...]


class UnitTimes:
    """Reads unit times off one device, remembering what it has read."""

    def __init__(self, device: Device, *, profile: ModelProfile, workload: Workload) -> None:
        self._device = device
        self._profile = profile
        self._batch = workload.batch_size
        self._timings = _matching_timings(device, profile, workload)
        self._known: dict[tuple[str, str, str | None, int | None, int, int, bool], Estimate] = {}

    def decode(self, unit: UnitProfile, *, context: int) -> Estimate:
        """Return the time of one decode step that attends to `context` tokens, itself included."""
        return self._remembered(unit, Work(1, context - 1, self._batch), is_decode=True)

    def prefill(self, unit: UnitProfile, *, tokens: int, past: int) -> Estimate:
        """Return the time of a prefill chunk of `tokens` after `past` cached ones."""
        return self._remembered(unit, Work(tokens, past, self._batch), is_decode=False)

    def is_measured(self, unit: UnitProfile) -> bool:
        """Return whether decode times of `unit` were measured."""
        return bool(self._table(unit, is_decode=True))

    def _remembered(self, unit: UnitProfile, work: Work, *, is_decode: bool) -> Estimate:
        window = unit.kv_window_tokens
        key = (unit.kind, unit.shapes_sha256, unit.weights, window, work.tokens, work.past, is_decode)
        if key not in self._known:
            self._known[key] = self._estimate(unit, work, is_decode=is_decode)
        return self._known[key]

    def _estimate(self, unit: UnitProfile, work: Work, *, is_decode: bool) -> Estimate:
        table = self._table(unit, is_decode=is_decode)
        if not table:
            return Estimate(self._roofline(unit, work))
        point = _point(unit, work, is_decode=is_decode)
        return estimate(
            table,
            point=point,
            model=lambda p: self._roofline(unit, _work(unit, p, is_decode=is_decode)),
        )

    def _roofline(self, unit: UnitProfile, work: Work) -> float:
        return roofline_seconds(unit, self._device, work=work, profile=self._profile)

    def _table(self, unit: UnitProfile, *, is_decode: bool) -> Table:
        """The first matching timings that hold rows for this kind of unit, with its weights stored as they were."""
        for timings in self._timings:
            is_other_layer = unit.kind == "layer" and timings.profile not in {"*", unit.shapes_sha256}
            if is_other_layer or timings.weights != unit.weights:
                continue
            table = _rows(timings, unit, is_decode=is_decode)
            if table:
                return table
        return ()


def unmeasured_widths(device: Device, profiles: Sequence[ModelProfile]) -> tuple[set[str], set[str]]:
    """Return how layers are stored that were timed on a device, and how others are whose times are estimates.

    Args:
        device: any.
        profiles: a model in all widths that are asked about.
    """
    shapes = {"*"} | {layer.shapes_sha256 for profile in profiles for layer in profile.layers}
    dtype = profiles[0].dtype
    fitting = (t for t in device.timings if t.dtype == dtype and t.profile in shapes and t.decode_seconds_per_layer)
    timed: set[str] = {timings.weights or dtype for timings in fitting}
    wanted: set[str] = {layer.weights or dtype for profile in profiles for layer in profile.layers}
    return timed, wanted - timed


def _matching_timings(device: Device, profile: ModelProfile, workload: Workload) -> tuple[Timings, ...]:
    """Timings for a layer of this model before those for any model, the fast path's before the reference path's."""
    hashes = {layer.shapes_sha256 for layer in profile.layers}
    fitting = [
        timings
        for timings in device.timings
        if timings.dtype == workload.dtype and (timings.profile == "*" or timings.profile in hashes)
    ]
    return tuple(sorted(fitting, key=lambda timings: (timings.profile == "*", timings.path == "reference")))


def _rows(timings: Timings, unit: UnitProfile, *, is_decode: bool) -> Table:
    if unit.kind == "embedding":
        return timings.embedding_seconds
    if unit.kind == "head":
        return timings.head_seconds
    return timings.decode_seconds_per_layer if is_decode else timings.prefill_seconds_per_layer


def _point(unit: UnitProfile, work: Work, *, is_decode: bool) -> Point:
    """Where `work` lies in the table: positions for the embedding, sequences for the head."""
    if unit.kind != "layer":
        return (work.rows if unit.kind == "embedding" else work.batch,)
    return (work.past + 1, work.batch) if is_decode else (work.tokens, work.past, work.batch)


def _work(unit: UnitProfile, point: Point, *, is_decode: bool) -> Work:
    """The reverse of `_point`."""
    numbers = [int(x) for x in point]
    if unit.kind != "layer":
        return Work(1, 0, numbers[0])
    return Work(1, numbers[0] - 1, numbers[1]) if is_decode else Work(numbers[0], numbers[1], numbers[2])
