"""The exact re-check of a plan: structure by JSON pointer, memory recomputed in integers.

It shares nothing with the solver; a plan that was edited, or that a solver got wrong, does not pass.
"""

from pathlib import Path

from plans.cluster import Device
from plans.errors import InputError, IntegrityError
from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import Plan, Stage
from plans.reading.strict import MAX_JSON_BYTES
from plans.stages import chain_fault

SHARE_TOLERANCE = 1e-9


def read_plan(path: Path) -> Plan:
    """Read a plan file and check it.

    Raises:
        InputError: malformed JSON, unknown or missing keys, or stages that are no chain over the model.
        IntegrityError: the recorded memory is not what the profile and workload give, or exceeds a budget.
    """
    plan = Plan.read(path, max_bytes=MAX_JSON_BYTES)
    check_plan(plan, where=path)
    return plan


def check_plan(plan: Plan, *, where: object) -> None:
    """Check a plan; errors as `read_plan`."""
    _check_chain(plan, where)
    for index, stage in enumerate(plan.stages):
        _check_memory(plan, index, stage, where)
    _check_share(plan, where)


def _fail(where: object, pointer: str, what: str, expected: str = "") -> InputError:
    return InputError(what, where=f"{where}:{pointer}", expected=expected, code="E-PLAN")


def _check_chain(plan: Plan, where: object) -> None:
    """Every unit exactly once, in order, at most one stage per device, no empty stage."""
    fault = chain_fault(plan.ranges, num_layers=plan.profile.model.num_hidden_layers)
    if fault is not None:
        raise _fail(where, f"/stages/{fault.index}/{fault.key}".rstrip("/"), fault.what, fault.expected)
    seen: set[str] = set()
    for index, stage in enumerate(plan.stages):
        if stage.device in seen:
            raise _fail(where, f"/stages/{index}/device", f"{stage.device} already holds another stage")
        seen.add(stage.device)
        _device(plan, index, where)


def _device(plan: Plan, index: int, where: object) -> Device:
    name = plan.stages[index].device
    try:
        return plan.cluster.device(name)
    except KeyError:
        present = ", ".join(device.name for device in plan.cluster.devices)
        raise _fail(
            where, f"/stages/{index}/device", f"{name} is not in the plan's cluster", f"one of {present}"
        ) from None


def _check_memory(plan: Plan, index: int, stage: Stage, where: object) -> None:
    device = _device(plan, index, where)
    needed = stage_memory(
        plan.profile,
        workload=plan.workload,
        stage=stage.range,
        overhead_bytes=device_overhead_bytes(
            device, plan.cluster, is_process_per_stage=plan.execution == "process_per_stage"
        ),
    )
    for key in ("weight_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes"):
        if getattr(stage, key) != getattr(needed, key):
            raise IntegrityError(
                f"the plan says {getattr(stage, key)}, the profile and workload give {getattr(needed, key)}",
                where=f"{where}:/stages/{index}/{key}",
                hint="solve again",
                code="E-PLAN-MEMORY",
            )
    if stage.budget_bytes != device.budget_bytes:
        raise IntegrityError(
            f"the plan says {stage.budget_bytes}, its device {device.name} offers {device.budget_bytes}",
            where=f"{where}:/stages/{index}/budget_bytes",
            hint="solve again",
            code="E-PLAN-MEMORY",
        )
    if stage.total_bytes > stage.budget_bytes:
        raise IntegrityError(
            f"needs {stage.total_bytes} bytes on {device.name}, whose budget is {stage.budget_bytes}",
            where=f"{where}:/stages/{index}",
            hint="solve again with a smaller --ctx-size or a larger budget",
            code="E-PLAN-MEMORY",
        )


def _check_share(plan: Plan, where: object) -> None:
    share = max(stage.total_bytes / stage.budget_bytes for stage in plan.stages)
    if abs(share - plan.prediction.max_memory_share) > SHARE_TOLERANCE:
        raise IntegrityError(
            f"the plan says {plan.prediction.max_memory_share}, its stages give {share}",
            where=f"{where}:/prediction/max_memory_share",
            hint="solve again",
            code="E-PLAN-MEMORY",
        )
