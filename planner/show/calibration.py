"""What a calibration says: predicted and measured stage by stage, and what another cut would gain."""

from collections.abc import Iterator
from typing import Any

from planner.answers.solve import objective_seconds
from planner.measure.calibrate import Calibration, StageDrift
from planner.show.words import duration
from plans.plan import Plan


def calibration_lines(found: Calibration) -> Iterator[str]:
    """Yield one line per stage of the run."""
    for number, drift in enumerate(found.stages):
        stage = drift.stage
        yield (
            f"stage {number} on {stage.device} ({stage.words}): "
            f"{_phase('decode', drift.predicted_decode_seconds, drift.measured_decode_seconds)}; "
            f"{_phase('prefill', drift.predicted_prefill_seconds, drift.measured_prefill_seconds)}"
        )


def gain_line(plan: Plan, same_cut: Plan | None) -> str:
    """Return what the new plan gains over the run's cut, both by corrected times."""
    new = objective_seconds(plan)
    if same_cut is None:
        return f"corrected: {duration(new)} with this cut; the run's own cut does not fit these budgets"
    old = objective_seconds(same_cut)
    cut = ", ".join(f"{stage.num_layers}@{stage.device}" for stage in plan.ranges)
    if new >= old or cut_of(plan) == cut_of(same_cut):
        return f"corrected: {duration(old)} with the run's cut; no other cut gains anything"
    return f"corrected: {duration(old)} with the run's cut, {duration(new)} with {cut}: {1 - new / old:.1%} less"


def cut_of(plan: Plan) -> tuple[tuple[str, int, int], ...]:
    """Return what makes two cuts the same."""
    return tuple((stage.device, stage.start_layer, stage.end_layer) for stage in plan.stages)


def as_json(found: Calibration, plan: Plan, same_cut: Plan | None) -> dict[str, Any]:
    """Return the calibration as plain data."""
    return {
        "stages": [_stage_json(drift) for drift in found.stages],
        "run_cut_seconds": None if same_cut is None else objective_seconds(same_cut),
        "new_cut_seconds": objective_seconds(plan),
    }


def _stage_json(drift: StageDrift) -> dict[str, Any]:
    return {
        "device": drift.stage.device,
        "start_layer": drift.stage.start_layer,
        "end_layer": drift.stage.end_layer,
        "predicted_decode_seconds": drift.predicted_decode_seconds,
        "measured_decode_seconds": drift.measured_decode_seconds,
        "predicted_prefill_seconds": drift.predicted_prefill_seconds,
        "measured_prefill_seconds": drift.measured_prefill_seconds,
    }


def _phase(name: str, predicted: float, measured: float) -> str:
    ratio = f" ({measured / predicted:.2f} x)" if predicted else ""
    return f"{name} {duration(predicted)} predicted, {duration(measured)} measured{ratio}"
