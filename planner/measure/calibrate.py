"""Calibration by a real run: what every stage was predicted to take, what it took, and a cluster corrected by that.

The rule: on every device of the run, all times of a phase are multiplied by one factor, so that the run's own stages
are then predicted to take exactly what they took.

    decode    factor = (measured seconds per token of the stage) / (predicted); layers, embedding and head alike
    prefill   layers get what the measured prefill leaves after embedding and head, which keep their decode factor
    rest      what a step took beyond its stages (choice of the token, masks) is charged to the first stage

Devices that took no part keep their times. A device without curves gets curves of one point, its roofline times the
factor; beyond that point they grow as the roofline does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.answers.solve import solve
from planner.measure.cluster import plain_name
from planner.problem.question import Question
from planner.timing.costs import CostModel
from plans.cluster import Cluster, Device, Timings
from plans.errors import InfeasibleError, IntegrityError
from plans.plan import Demands, Plan
from plans.profile import ModelProfile, PackedName
from plans.run import RunStage, TimedRun
from plans.stages import StageRange
from plans.workload import Workload

PREFILL_FLOOR = 0.01
"""A prefill that leaves less than this share for its layers is noise."""
TABLES = ("decode_seconds_per_layer", "prefill_seconds_per_layer", "embedding_seconds", "head_seconds")
"""Of a device's timings."""


@dataclass(frozen=True, slots=True)
class StageDrift:
    """One stage: predicted and measured seconds per decode step and for the prefill."""

    stage: StageRange
    predicted_decode_seconds: float
    measured_decode_seconds: float
    predicted_prefill_seconds: float
    measured_prefill_seconds: float

    @property
    def decode_factor(self) -> float:
        """Measured over predicted."""
        return self.measured_decode_seconds / self.predicted_decode_seconds


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a run taught.

    Attributes:
        cluster: with corrected times.
        stages: the run's cut, stage by stage.
        workload: what the run was asked for.
    """

    cluster: Cluster
    stages: tuple[StageDrift, ...]
    workload: Workload


def same_cut(plan: Plan, calibration: Calibration) -> Plan | None:
    """Return the run's own cut under the plan's workload and the corrected times, or None where it does not fit."""
    cut = ",".join(f"{d.stage.start_layer}-{d.stage.end_layer}@{d.stage.device}" for d in calibration.stages)
    try:
        return solve(replace(Question.of(plan), strategy="custom", demands=Demands(layers=cut)))
    except InfeasibleError:
        return None


def calibrate(cluster: Cluster, profile: ModelProfile, run: TimedRun, *, where: object) -> Calibration:
    """Compare a run with what the cluster predicts for it, and correct the cluster.

    Args:
        cluster: the devices that were planned with.
        profile: the model, in the dtype of the run.
        run: from `plans.run.read_run`.
        where: its path, for messages.

    Raises:
        IntegrityError: the run is of another model, dtype or cluster.
    """
    _check_identity(cluster, profile, run, where)
    workload = run.workload(profile)
    model = CostModel(profile, workload=workload, cluster=cluster)
    drifts = tuple(_drift(model, stage, run, is_first=index == 0) for index, stage in enumerate(run.stages))
    corrected = {drift.stage.device: _corrected(model, drift) for drift in drifts}
    devices = tuple(corrected.get(device.name, device) for device in cluster.devices)
    return Calibration(cluster.model_copy(update={"devices": devices}), drifts, workload)


def _check_identity(cluster: Cluster, profile: ModelProfile, run: TimedRun, where: object) -> None:
    layers = profile.model.num_hidden_layers
    if run.config_sha256 != profile.model.config_sha256:
        raise _other(where, "model", run.config_sha256, profile.model.config_sha256)
    if run.stages[-1].end_layer != layers:
        raise _other(where, "model", f"{run.stages[-1].end_layer} layers", f"{layers} layers")
    if run.dtype_name != profile.dtype:
        raise _other(where, "dtype", run.dtype_name, profile.dtype)
    names = {device.name for device in cluster.devices}
    for index, stage in enumerate(run.stages):
        if plain_name(stage.planned_device) != stage.device:
            raise _other(where, "placement", f"stage {index} ran on {stage.device}", stage.planned_device)
        if stage.planned_device not in names:
            raise _other(
                where, "cluster", f"stage {index} on {stage.planned_device}", f"one of {', '.join(sorted(names))}"
            )


def _other(where: object, what: str, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"the run was made with another {what}: {found}",
        where=where,
        expected=expected,
        hint="calibrate with a run of this model on this cluster",
        code="E-CALIBRATE",
    )


def _drift(model: CostModel, stage: RunStage, run: TimedRun, *, is_first: bool) -> StageDrift:
    return StageDrift(
        stage=stage.range,
        predicted_decode_seconds=model.stage_decode_seconds(stage.range),
        measured_decode_seconds=stage.decode_compute_seconds / stage.decode_steps + is_first * run.rest_seconds,
        predicted_prefill_seconds=math.fsum(model.stage_prefill_seconds(stage.range)),
        measured_prefill_seconds=stage.prefill_compute_seconds,
    )


def _corrected(model: CostModel, drift: StageDrift) -> Device:
    """Return the device with all its times of this shape multiplied."""
    device, profile, work = model.cluster.device(drift.stage.device), model.profile, model.workload
    factor = drift.decode_factor
    ends = [unit for unit in drift.stage.units(profile) if unit.kind != "layer"]
    end_seconds = factor * math.fsum(s for unit in ends for s in model.prefill_seconds(unit, device.name))
    layers_seconds = drift.predicted_prefill_seconds - end_seconds / factor
    left = max(drift.measured_prefill_seconds - end_seconds, PREFILL_FLOOR * drift.measured_prefill_seconds)
    prefill_factor = left / layers_seconds if layers_seconds > 0 else factor
    known = _known_curves(device, profile)
    known += _point_curves(model, device, work, known=known)
    return device.model_copy(
        update={"timings": tuple(_scaled(t, decode=factor, prefill=prefill_factor) for t in known)}
    )


def _known_curves(device: Device, profile: ModelProfile) -> tuple[Timings, ...]:
    shapes = {"*"} | {layer.shapes_sha256 for layer in profile.layers}
    return tuple(t for t in device.timings if t.dtype == profile.dtype and t.profile in shapes)


def _point_curves(model: CostModel, device: Device, work: Workload, *, known: Sequence[Timings]) -> tuple[Timings, ...]:
    """The roofline at the run's own point, as curves of that one point, for each way weights are stored.

    Only tables that nobody measured: layers may be known, and a head that is stored otherwise not.
    """
    found = []
    for weights in dict.fromkeys(unit.weights for unit in model.profile.units):
        point = _point_curve(model, device.name, work, weights)
        same = [timings for timings in known if timings.weights == weights]
        present = {table: () for table in TABLES if any(getattr(timings, table) for timings in same)}
        point = point.model_copy(update=present)
        found += [point] if any(getattr(point, table) for table in TABLES) else []
    return tuple(found)


def _point_curve(model: CostModel, device: str, work: Workload, weights: PackedName | None) -> Timings:
    profile, batch = model.profile, work.batch_size
    layer = next((layer for layer in profile.layers if layer.weights == weights), None)
    found: dict[str, Any] = {}
    if layer is not None:
        chunks = zip(work.prefill_chunks, model.prefill_seconds(layer, device), strict=True)
        found["decode_seconds_per_layer"] = ((work.decode_context_tokens, batch, model.decode_seconds(layer, device)),)
        found["prefill_seconds_per_layer"] = tuple((tokens, past, batch, s) for (tokens, past), s in chunks)
    for key, unit in (("embedding_seconds", profile.embedding), ("head_seconds", profile.head)):
        if unit.weights == weights:
            found[key] = ((batch, model.decode_seconds(unit, device)),)
    shape = (layer or profile.layers[0]).shapes_sha256
    return Timings(profile=shape, dtype=profile.dtype, weights=weights, **found)


def _scaled(timings: Timings, *, decode: float, prefill: float) -> Timings:
    def times(factor: float) -> Callable[[tuple[float, ...]], tuple[float, ...]]:
        return lambda row: (*row[:-1], row[-1] * factor)

    return timings.model_copy(
        update={
            "decode_seconds_per_layer": tuple(map(times(decode), timings.decode_seconds_per_layer)),
            "prefill_seconds_per_layer": tuple(map(times(prefill), timings.prefill_seconds_per_layer)),
            "embedding_seconds": tuple(map(times(decode), timings.embedding_seconds)),
            "head_seconds": tuple(map(times(decode), timings.head_seconds)),
        }
    )
