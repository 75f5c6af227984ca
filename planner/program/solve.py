"""One goal, one integer program, one answer: plain data in, plain data out; solver objects never leave this file.

The program is `ilp_counts` where all layers are alike and `ilp_layers` where they differ. An answer counts only after
an exact check in integers; a solver that fails it, or that finds nothing where it may be wrong, is asked again with
other settings and then replaced.
"""

import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pulp

from planner.problem.evaluate import Value, evaluate, violations
from planner.problem.goal import Goal, IlpAnswer, SolverName
from planner.problem.problem import Assignment, Problem, chain_costs, is_pipelined
from planner.program.counts import add_counts_goal, build_counts_model, read_counts
from planner.program.layers import add_layers_goal, build_layers_model, read_layers

_ACCURACY = 1e-6
"""Relative difference between a solver's own objective value and the exact one that is still rounding."""
_AGGREGATOR = 1 << 12
"""The bit of HiGHS' `presolve_rule_off` that stands for the rule named Aggregator."""


class SolverFaultError(Exception):
    """The solver crashed, is missing, or gave an answer that cannot be right (`is_wrong`)."""

    def __init__(self, text: str, *, is_wrong: bool = True) -> None:
        self.is_wrong = is_wrong
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class _Attempt:
    solver: SolverName
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class _Run:
    """What one solver run reported, in solver units."""

    sol_status: int
    bound: float | None
    version: str
    is_contradictory: bool = False


def solve_ilp(
    problem: Problem,
    goal: Goal,
    *,
    solvers: tuple[SolverName, ...] = ("highs", "cbc"),
    mip_gap: float = 0.0,
    time_limit: float | None = None,
    is_second_opinion: bool = False,
) -> IlpAnswer:
    """Minimise `goal` over all assignments of `problem`.

    Args:
        solvers: which to use; a later one only where an earlier one fails.
        mip_gap: relative gap at which to stop; 0 proves the optimum.
        time_limit: seconds for all attempts together; the solver itself may overstep it (see `solver_process`).
        is_second_opinion: the usual settings gave an answer that was refuted; start with the next ones.

    Raises:
        SolverFaultError: no solver gave an answer that holds.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    faults: list[str] = []
    is_wrong = False
    no_plan: IlpAnswer | None = None
    for attempt in list(_attempts(problem, solvers))[is_second_opinion:] or _attempts(problem, solvers):
        left = None if deadline is None else max(deadline - time.monotonic(), 0.1)
        try:
            answer = _solve_once(problem, goal, attempt, mip_gap=mip_gap, time_limit=left)
        except SolverFaultError as fault:
            faults.append(f"{attempt.solver}: {fault}")
            is_wrong = is_wrong or fault.is_wrong
            continue
        if answer.status != "infeasible":
            return answer
        if no_plan is not None or attempt.solver == "cbc":
            return answer
        no_plan = answer  # ask once more: presolve has been seen to lose every solution
    if no_plan is not None:
        return no_plan
    raise SolverFaultError("; ".join(faults), is_wrong=is_wrong)


def _attempts(problem: Problem, solvers: tuple[SolverName, ...]) -> Iterator[_Attempt]:
    """HiGHS 1.16 presolve calls feasible fixed-order programs infeasible, and others optimal 5 % too early.

    Switching its Aggregator rule off cures both; without presolve a fixed order is 10 times faster besides.
    """
    for solver in solvers:
        if solver == "cbc":
            yield _Attempt("cbc")
            continue
        settings: list[tuple[tuple[str, Any], ...]] = [(("presolve_rule_off", _AGGREGATOR),), (("presolve", "off"),)]
        for options in reversed(settings) if problem.keep_order else settings:
            yield _Attempt("highs", options)


def _solve_once(
    problem: Problem, goal: Goal, attempt: _Attempt, *, mip_gap: float, time_limit: float | None
) -> IlpAnswer:
    unit = solver_unit(problem, goal)
    lp, read = _build(problem, goal, unit=unit)
    run = _run_highs if attempt.solver == "highs" else _run_cbc
    result = run(lp, attempt, mip_gap=mip_gap, time_limit=time_limit)
    name = "HiGHS" if attempt.solver == "highs" else "CBC"
    per_solver_unit = Fraction(1) / Fraction(unit) if goal.kind == "time" else Fraction(1, 100)
    bound = None if result.bound is None else result.bound * float(per_solver_unit)
    if result.is_contradictory:
        raise SolverFaultError(f"{name} calls a bounded program unbounded or undefined")
    if result.sol_status == pulp.LpSolutionInfeasible:
        return IlpAnswer("infeasible", name, result.version)
    if result.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return IlpAnswer("time_limit", name, result.version, bound=bound)
    assignment, worth = _checked(problem, goal, read, name)
    value = goal.value(time=worth.time, share=worth.share)
    if goal.max_time is not None and worth.time > goal.max_time:
        # Fast enough but for the solver's rounding, as where all times are almost the same: a bound, and no plan.
        return IlpAnswer("time_limit", name, result.version, bound=bound)
    claimed = _objective_value(lp) * float(per_solver_unit)
    # A pipelined prefill is minimised by a lower bound, so its answer may be worth more than claimed; one that is
    # not optimal may be worth less, since a largest share or period need not be pressed down yet.
    is_exact = goal.kind == "share" or not is_pipelined(problem, goal.objective)
    is_finished = result.sol_status == pulp.LpSolutionOptimal
    tolerance = _ACCURACY * max(abs(claimed), abs(float(value)), 1e-9)
    if (is_exact and float(value) - claimed > tolerance) or (is_finished and claimed - float(value) > tolerance):
        raise SolverFaultError(f"{name} claims {claimed}, its answer is worth {float(value)}")
    has_gap = _has_gap(bound, value) if mip_gap > 0 or not is_exact else False
    is_proved = is_finished and not has_gap
    return IlpAnswer(
        "optimal" if is_proved else "feasible", name, result.version, assignment, value,
        float(value) if is_proved else bound,
    )  # fmt: skip


def _checked(problem: Problem, goal: Goal, read: Callable[[], Assignment], name: str) -> tuple[Assignment, Value]:
    """The exact check: the assignment in integers, and what it is worth by the problem's own data."""
    try:
        assignment = read()
    except (IndexError, StopIteration):
        raise SolverFaultError(f"{name} gave an answer that is no path") from None
    broken = violations(problem, assignment)
    if broken:
        raise SolverFaultError(f"{name} gave an answer in which {broken[0]}")
    return assignment, evaluate(problem, assignment, objective=goal.objective)


def _has_gap(bound: float | None, value: Fraction) -> bool:
    # With a gap asked for, or a bound as objective, the solver's "optimal" does not mean that the value is.
    return bound is None or float(value) - bound > _ACCURACY * abs(float(value))


def _build(problem: Problem, goal: Goal, *, unit: float) -> tuple[Any, Callable[[], Assignment]]:
    if problem.has_identical_layers:
        counts = build_counts_model(problem, unit=unit)
        add_counts_goal(counts, goal)
        return counts.lp, lambda: read_counts(counts)
    layers = build_layers_model(problem, unit=unit)
    add_layers_goal(layers, goal)
    return layers.lp, lambda: read_layers(layers)


def solver_unit(problem: Problem, goal: Goal) -> float:
    """Return solver units per tick: milliseconds, or a power of ten that brings a chain's time near 100."""
    costs = chain_costs(problem, goal.objective)
    fastest = [min(times) for times in zip(*(units.layers for units in costs.units), strict=True)]
    typical = sum(fastest) + min(u.embedding for u in costs.units) + min(u.head for u in costs.units)
    milliseconds = typical * problem.tick_seconds * 1e3
    unit = problem.tick_seconds * 1e3
    if typical and not 1 <= milliseconds <= 1e4:
        digits = len(str(typical))
        unit = 10.0 ** (3 - digits)
    return unit


def _run_highs(lp: Any, attempt: _Attempt, *, mip_gap: float, time_limit: float | None) -> _Run:
    try:
        import highspy
    except ImportError as error:
        raise SolverFaultError(f"HiGHS cannot be imported ({error})", is_wrong=False) from None
    solver = pulp.HiGHS(
        msg=False, gapRel=mip_gap, gapAbs=0.0, threads=1, timeLimit=time_limit, random_seed=0, **dict(attempt.options)
    )
    try:
        lp.solve(solver)
    except pulp.PulpSolverError as error:
        raise SolverFaultError(str(error), is_wrong=False) from None
    highs = lp.solverModel
    status = highs.getModelStatus()
    # PuLP reports "unbounded or infeasible" as infeasible, which it may not be.
    doubtful = (highspy.HighsModelStatus.kUnboundedOrInfeasible, highspy.HighsModelStatus.kUnbounded)
    bound = highs.getInfo().mip_dual_bound
    finite = bound if abs(bound) < 1e100 else None
    return _Run(lp.sol_status, finite, highs.version(), is_contradictory=status in doubtful)


def _run_cbc(lp: Any, _attempt: _Attempt, *, mip_gap: float, time_limit: float | None) -> _Run:
    # CBC works through files: a folder of our own, so that nothing stays behind when it crashes.
    try:
        with tempfile.TemporaryDirectory(prefix="llamaplan-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 4 will find CBC elsewhere
            log = Path(folder) / "cbc.log"
            solver = pulp.PULP_CBC_CMD(
                msg=False, gapRel=mip_gap, gapAbs=0.0, timeLimit=time_limit, logPath=str(log), keepFiles=False
            )
            solver.tmpDir = folder
            lp.solve(solver)
            text = log.read_text(errors="replace")
    except (pulp.PulpError, OSError, ValueError) as error:
        raise SolverFaultError(f"CBC failed: {error}", is_wrong=False) from None
    version = re.search(r"Version:\s*(\S+)", text)
    bound = re.search(r"Lower bound:\s*(\S+)", text)
    is_contradictory = lp.sol_status == pulp.LpSolutionUnbounded or lp.status == pulp.LpStatusUndefined
    return _Run(
        lp.sol_status,
        float(bound.group(1)) if bound else None,
        version.group(1) if version else "unknown",
        is_contradictory,
    )


def _objective_value(lp: Any) -> float:
    # CBC leaves variables that no row mentions without a value.
    return float(lp.objective.constant + sum(cost * (v.varValue or 0.0) for v, cost in lp.objective.items()))
