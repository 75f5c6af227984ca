"""The Python API of the planner: profile + cluster + workload -> the best plan, proved."""

from dataclasses import asdict
from fractions import Fraction

from planner.answers.explain import explain_infeasible
from planner.answers.strategies import Outcome, run_strategy
from planner.problem.problem import Problem
from planner.problem.question import Question
from planner.program.effort import USUAL, Effort
from planner.timing.costs import StageSeconds, predict
from plans.check import check_plan
from plans.errors import InfeasibleError
from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import NO_DEMANDS, Plan, Prediction, Proof, Stage, TradeOff
from plans.stages import StageRange


def solve(question: Question, effort: Effort = USUAL) -> Plan:
    """Find the best plan.

    Returns:
        A plan that was checked exactly. It holds nothing that changes from run to run.

    Raises:
        InfeasibleError: there is no plan (the message says what is short and what would help), or none was found in
            time.
        UsageError: demands that contradict each other.
        MachineError: no solver works here.
    """
    given = question.terms.given
    with effort.session() as session:
        problem = question.problem()
        outcome = run_strategy(
            problem, strategy=question.strategy, objective=question.objective, session=session, weight=question.weight,
            given=given,
        )  # fmt: skip
        if outcome.assignment is None:
            raise _out_of_time(effort) if outcome.status == "time_limit" else explain_infeasible(question)
    plan = _make_plan(question, problem, outcome)
    check_plan(plan, where="plan")
    return plan


def _out_of_time(effort: Effort) -> InfeasibleError:
    return InfeasibleError(
        f"no plan was found in {effort.time_limit:g} s, and none was proved impossible",
        hint="raise --time-limit",
        code="E-TIME",
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


def _make_plan(question: Question, problem: Problem, outcome: Outcome) -> Plan:
    assert outcome.assignment is not None
    profile, cluster, workload = question.profile, question.cluster, question.workload
    ranges = problem.ranges(outcome.assignment)
    seconds, prediction = predict(
        profile, workload=workload, cluster=cluster, stages=ranges, execution=question.execution
    )
    stages = tuple(_make_stage(question, stage, times) for stage, times in zip(ranges, seconds, strict=True))
    draft = Plan(
        strategy=question.strategy,
        objective=question.objective,
        mixed_weight=question.weight if question.strategy == "mixed" else None,
        execution=question.execution,
        demands=None if question.demands == NO_DEMANDS else question.demands,
        weights=question.weights,
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


def _make_stage(question: Question, stage: StageRange, seconds: StageSeconds) -> Stage:
    device = question.cluster.device(stage.device)
    is_process_per_stage = question.execution == "process_per_stage"
    memory = stage_memory(
        question.profile,
        workload=question.workload,
        stage=stage,
        overhead_bytes=device_overhead_bytes(device, question.cluster, is_process_per_stage=is_process_per_stage),
    )
    return Stage(
        **asdict(stage),
        **asdict(memory),
        budget_bytes=device.budget_bytes or 0,
        **asdict(seconds),
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
