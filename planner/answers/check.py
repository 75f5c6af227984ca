"""Recompute a plan, also one written by hand: its times by the cost model, its model by the checkpoint's headers."""

import math
from pathlib import Path

from planner.answers.capacity import chain_of
from planner.answers.solve import objective_seconds
from planner.model.profile import build_profile
from planner.problem.evaluate import violations
from planner.problem.question import Question
from planner.timing.costs import predict
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import Checkpoint, check_same_shapes
from plans.errors import IntegrityError
from plans.plan import Plan, Prediction

_ACCURACY = 1e-9


def recompute(plan: Plan, *, where: object) -> Prediction:
    """Return what the plan's own profile, workload and cluster predict for its stages.

    Raises:
        IntegrityError: a recorded time is another, or the stages break the plan's demands.
        UsageError: its demands are malformed.
    """
    seconds, prediction = predict(
        plan.profile, workload=plan.workload, cluster=plan.cluster, stages=plan.ranges, execution=plan.execution
    )
    for index, (stage, times) in enumerate(zip(plan.stages, seconds, strict=True)):
        for key in ("decode_seconds", "prefill_seconds", "hop_seconds"):
            _compare(getattr(stage, key), getattr(times, key), f"{where}:/stages/{index}/{key}")
    for key in type(prediction).model_fields:
        _compare(getattr(plan.prediction, key), getattr(prediction, key), f"{where}:/prediction/{key}")
    _check_proof(plan, where)
    if plan.demands is not None and (broken := violations(Question.of(plan).problem(), chain_of(plan))):
        raise IntegrityError(
            f"the plan breaks its own demands: {broken[0]}", where=f"{where}:/demands", hint="solve again",
            code="E-PLAN-DEMANDS",
        )  # fmt: skip
    return prediction


def _check_proof(plan: Plan, where: object) -> None:
    """What is said of the optimum is said of this plan; whether it is one, only solving again tells."""
    proof, others = plan.proof, {"memory": plan.prediction.max_memory_share, "mixed": plan.proof.objective}
    value = others.get(plan.strategy, objective_seconds(plan))
    _compare(proof.objective, value, f"{where}:/proof/objective")
    bound = value if proof.status in ("optimal", "given") else min(proof.bound, value)
    _compare(proof.bound, bound, f"{where}:/proof/bound")
    _compare(proof.gap, (value - bound) / value if value > 0 else 0.0, f"{where}:/proof/gap")


def _compare(recorded: float, computed: float, where: str) -> None:
    if not math.isclose(recorded, computed, rel_tol=_ACCURACY, abs_tol=1e-15):
        raise IntegrityError(
            f"the plan says {recorded!r}, its own data give {computed!r}",
            where=where,
            hint="solve again",
            code="E-PLAN-TIME",
        )


def check_against_model(plan: Plan, path: Path) -> list[str]:
    """Compare a plan with a checkpoint; return warnings.

    Raises:
        IntegrityError: the checkpoint's tensors are not those the plan was made for, or a unit of it has another size
            when it is packed as the plan says.
        InputError: the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.has_weights:
        return [f"{path} is only a configuration; its tensors cannot be compared"]
    check_same_shapes({(u.kind, u.index): u.shapes_sha256 for u in plan.profile.units}, checkpoint)
    _check_sizes(plan, checkpoint)
    if checkpoint.config.sha256 != plan.profile.model.config_sha256:
        return ["the configuration differs from the plan's, its tensor shapes do not: another revision of the model"]
    return []


def _check_sizes(plan: Plan, checkpoint: Checkpoint) -> None:
    profile = plan.profile
    sized = build_profile(checkpoint, dtype=profile.dtype, kv_cache_dtype=profile.kv_cache_dtype, choice=plan.weights)
    for unit, found in zip(profile.units, sized.units, strict=True):
        name = f"layer {unit.index}" if unit.kind == "layer" else f"the {unit.kind}"
        for key in ("weight_bytes", "kv_bytes_per_token", "kv_window_tokens", "state_bytes_per_sequence"):
            if getattr(unit, key) != getattr(found, key):
                raise IntegrityError(
                    f"the plan counts {getattr(unit, key)} {key} for {name}, the model gives {getattr(found, key)}",
                    where=checkpoint.path,
                    hint="solve again",
                    code="E-PLAN-MEMORY",
                )
