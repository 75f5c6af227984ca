"""The tables of `llamaplan frontier`, and the same as plain data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.answers.frontier import FrontierPoint
from planner.show.words import duration
from plans.commands.console import table

if TYPE_CHECKING:
    from rich.table import Table


def frontier_table(points: Sequence[FrontierPoint]) -> "Table":
    """Return one row per point, with what it costs in time against the fastest."""
    rows = table(numbers=("time", "slower by", "share", "devices"), folded=("layers per device",))
    best = min(point.seconds for point in points)
    for point in points:
        slower = f"{point.seconds / best - 1:.1%}" if best else ""
        cut = ", ".join(f"{stage.device} {stage.num_layers}" for stage in point.stages)
        proof = "" if point.status == "optimal" else " (not proved)"
        rows.add_row(duration(point.seconds), slower, f"{point.memory_share:.1%}", str(point.num_devices), cut + proof)
    return rows


def as_json(point: FrontierPoint) -> dict[str, Any]:
    """Return one point as plain data."""
    return {
        "seconds": point.seconds,
        "memory_share": point.memory_share,
        "num_devices": point.num_devices,
        "status": point.status,
        "certified_by": point.certified_by,
        "stages": [
            {"device": stage.device, "start_layer": stage.start_layer, "end_layer": stage.end_layer}
            for stage in point.stages
        ],
    }
