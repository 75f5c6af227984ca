"""The Python API of the planner: profile + cluster + workload -> the best plan, proved."""

from collections.abc import Iterable
from fractions import Fraction

from planner.answers.case import Case
from planner.answers.explain import explain_infeasible
from planner.answers.strategies import Outcome, run_strategy
from planner.problem.build import build_problem
from planner.problem.demands import read_demands
from planner.problem.goal import SolverName
from planner.problem.problem import Assignment, Problem
from planner.program.session import SolverSession
from planner.timing.costs import StageRange, StageSeconds, predict
from plans.check import check_plan
from plans.cluster import Cluster
from plans.errors import InfeasibleError, UsageError
from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import Execution, Objective, Plan, Prediction, Proof, Stage, Strategy, TradeOff
from plans.profile import ModelProfile
from plans.workload import Workload

DEFAULT_TIME_LIMIT = 60.0


def solve(
    profile: ModelProfile,
    *,
    cluster: Cluster,
    workload: Workload,
    strategy: Strategy = "compute",
    objective: Objective = "latency",
    weight: float = 0.5,
    execution: Execution = "one_process",
    keep_order: bool = False,
    use_all: bool = False,
    layers: str | None = None,
    pins: Iterable[str] = (),
    bans: Iterable[str] = (),
    solvers: tuple[SolverName, ...] = ("highs", "cbc"),
    time_limit: float | None = DEFAULT_TIME_LIMIT,
    mip_gap: float = 0.0,
    is_isolated: bool = True,
) -> Plan:
    """Find the best plan.

    Args:
        profile: the model, from `planner.model.profile.build_profile`.
        cluster: devices with budgets, from `planner.devices.clusters.load_cluster` or
            `planner.devices.budgets.with_budgets`.
        workload: what is asked of it; its dtypes must be the profile's.
        strategy: what is minimised, see `planner.answers.strategies`.
        objective: which time is meant: seconds per token, seconds of a whole request, or the step period.
        weight: of time in `mixed`, from 0 to 1.
        execution: whether stages share a process.
        keep_order: stages follow the order of the devices.
        use_all: every device gets a stage.
        layers, pins, bans: demands of `planner.problem.demands`; `layers` is for the strategy `custom`.
        solvers: HiGHS, then CBC where it fails.
        time_limit: seconds for everything; None for no limit.
        mip_gap: relative gap at which the solver may stop; 0 proves the optimum.
        is_isolated: False runs the solver in this process, where nobody can stop it.

    Returns:
        A plan that was checked exactly. It holds nothing that changes from run to run.

    Raises:
        InfeasibleError: there is no plan (the message says what is short and what would help), or none was found in
            time.
        UsageError: options that contradict each other.
        MachineError: no solver works here.
    """
    _check_options(strategy, weight, layers)
    names = [device.name for device in cluster.devices]
    demands = read_demands(names, profile.model.num_hidden_layers, layers=layers, pins=pins, bans=bans)
    with SolverSession(solvers, mip_gap=mip_gap, time_limit=time_limit, is_isolated=is_isolated) as session:
        problem = build_problem(
            profile,
            workload=workload,
            cluster=cluster,
            execution=execution,
            rules=demands.rules,
            keep_order=keep_order or demands.keep_order,
            use_all=use_all,
        )
        outcome = run_strategy(
            problem, strategy=strategy, objective=objective, session=session, weight=weight, given=demands.given
        )
        if outcome.assignment is None:
            if outcome.status == "time_limit":
                raise _out_of_time(time_limit)
            raise explain_infeasible(Case(problem, profile, workload, cluster, strategy, demands.given))
    plan = _make_plan(
        problem, outcome, profile=profile, cluster=cluster, workload=workload, strategy=strategy, objective=objective,
        weight=weight,
    )  # fmt: skip
    check_plan(plan, where="plan")
    return plan


def _check_options(strategy: Strategy, weight: float, layers: str | None) -> None:
    if not 0 <= weight <= 1:
        raise UsageError(f"--weight is {weight}", expected="0 to 1")
    if layers is not None and strategy != "custom":
        raise UsageError(f"--layers belongs to the strategy custom, not {strategy}")


def _out_of_time(time_limit: float | None) -> InfeasibleError:
    return InfeasibleError(
        f"no plan was found in {time_limit:g} s, and none was proved impossible",
        hint="raise --time-limit",
        code="E-TIME",
    )


def stage_ranges(problem: Problem, assignment: Assignment) -> tuple[StageRange, ...]:
    """Return an assignment with device names, as the cost model takes it."""
    last = len(assignment) - 1
    return tuple(
        StageRange(problem.devices[s.device].name, s.start, s.end, i == 0, i == last) for i, s in enumerate(assignment)
    )


def objective_seconds(plan: Plan) -> float:
    """Return the plan's time by its objective, in seconds (the step period for `throughput`)."""
    prediction, workload = plan.prediction, plan.workload
    if plan.objective == "latency":
        return prediction.seconds_per_token
    if plan.objective == "request":
        steps = max(workload.new_tokens - 1, 0)
        return prediction.time_to_first_token_seconds + steps * prediction.seconds_per_token
    slowest = max(max(stage.decode_seconds, stage.hop_seconds) for stage in plan.stages)
    cycle = prediction.seconds_per_token / workload.requests_in_flight
    return max(slowest, prediction.return_hop_seconds, cycle)


def _make_plan(
    problem: Problem,
    outcome: Outcome,
    *,
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    strategy: Strategy,
    objective: Objective,
    weight: float,
) -> Plan:
    assert outcome.assignment is not None
    ranges = stage_ranges(problem, outcome.assignment)
    seconds, prediction = predict(
        profile, workload=workload, cluster=cluster, stages=ranges, execution=problem.execution
    )
    stages = tuple(
        _make_stage(problem, profile, cluster, workload, stage, times)
        for stage, times in zip(ranges, seconds, strict=True)
    )
    draft = Plan(
        strategy=strategy,
        objective=objective,
        mixed_weight=weight if strategy == "mixed" else None,
        execution=problem.execution,
        workload=workload,
        cluster=cluster,
        profile=profile,
        stages=stages,
        prediction=prediction,
        proof=_proof(problem, outcome, prediction, time_seconds=0.0),
    )
    time_seconds = objective_seconds(draft)
    update = {
        "proof": _proof(problem, outcome, prediction, time_seconds=time_seconds),
        "trade_off": _trade_off(problem, outcome, prediction, time_seconds=time_seconds),
    }
    return draft.model_copy(update=update)


def _make_stage(
    problem: Problem,
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    stage: StageRange,
    seconds: StageSeconds,
) -> Stage:
    device = cluster.device(stage.device)
    is_process_per_stage = problem.execution == "process_per_stage"
    memory = stage_memory(
        profile,
        workload=workload,
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        has_embedding=stage.has_embedding,
        has_head=stage.has_head,
        overhead_bytes=device_overhead_bytes(device, cluster, is_process_per_stage=is_process_per_stage),
    )
    return Stage(
        device=stage.device,
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        has_embedding=stage.has_embedding,
        has_head=stage.has_head,
        weight_bytes=memory.weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        activation_bytes=memory.activation_bytes,
        overhead_bytes=memory.overhead_bytes,
        budget_bytes=device.budget_bytes or 0,
        decode_seconds=seconds.decode_seconds,
        prefill_seconds=seconds.prefill_seconds,
        hop_seconds=seconds.hop_seconds,
    )


def _proof(problem: Problem, outcome: Outcome, prediction: Prediction, *, time_seconds: float) -> Proof:
    """The first key and what is known about it; times as predicted, so that the plan agrees with itself."""
    kind = outcome.goal.kind
    value = {"time": time_seconds, "share": prediction.max_memory_share, "mixed": float(outcome.value or 0)}[kind]
    bound = value
    if outcome.status not in ("optimal", "given"):
        known = outcome.bound or Fraction(0)
        bound = min(value, problem.seconds(known, outcome.goal.objective) if kind == "time" else float(known))
    return Proof(
        status=outcome.status,
        objective=value,
        bound=bound,
        gap=(value - bound) / value if value > 0 else 0.0,
        solver=outcome.solver,
        solver_version=outcome.solver_version,
        certified_by=outcome.certified_by,
    )


def _trade_off(problem: Problem, outcome: Outcome, prediction: Prediction, *, time_seconds: float) -> TradeOff | None:
    if outcome.best_time is None or outcome.best_share is None:
        return None
    best_time = problem.seconds(outcome.best_time, outcome.goal.objective)
    best_share = float(outcome.best_share)
    return TradeOff(
        best_time_seconds=best_time,
        best_memory_share=best_share,
        time_given_up=max(0.0, time_seconds / best_time - 1) if best_time else 0.0,
        memory_share_given_up=max(0.0, prediction.max_memory_share / best_share - 1) if best_share else 0.0,
    )
