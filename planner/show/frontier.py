"""The tables of `llamaplan frontier`, and the same as plain data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.answers.frontier import FrontierPoint
from planner.problem.problem import Problem
from planner.show.words import duration
from plans.commands.console import table

if TYPE_CHECKING:
    from rich.table import Table


def frontier_table(problem: Problem, points: Sequence[FrontierPoint]) -> "Table":
    """Return one row per point, with what it costs in time against the fastest."""
    rows = table(numbers=("time", "slower by", "share", "devices"), folded=("layers per device",))
    best = min(point.seconds for point in points)
    for point in points:
        slower = f"{point.seconds / best - 1:.1%}" if best else ""
        cut = ", ".join(f"{problem.devices[s.device].name} {s.end - s.start}" for s in point.assignment)
        proof = "" if point.status == "optimal" else " (not proved)"
        rows.add_row(duration(point.seconds), slower, f"{point.memory_share:.1%}", str(point.num_devices), cut + proof)
    return rows


def as_json(problem: Problem, point: FrontierPoint) -> dict[str, Any]:
    """Return one point as plain data."""
    return {
        "seconds": point.seconds,
        "memory_share": point.memory_share,
        "num_devices": point.num_devices,
        "status": point.status,
        "certified_by": point.certified_by,
        "stages": [
            {"device": problem.devices[s.device].name, "start_layer": s.start, "end_layer": s.end}
            for s in point.assignment
        ],
    }
