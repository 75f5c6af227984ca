"""The strategies: which goals are minimised, and in which order.

uniform   nothing: layer counts differ by at most 1, earlier stages take the remainder
memory    the largest memory share; second key: time
compute   time by the objective (latency, request, throughput); second key: memory share
mixed     weight * time / best time + (1 - weight) * share / best share
custom    what the rules leave open is minimised as by `compute`
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from planner.answers.settle import Settled, minimise
from planner.problem.evaluate import evaluate, violations
from planner.problem.goal import Goal
from planner.problem.problem import Assignment, Problem
from planner.problem.uniform import uniform_problem
from planner.program.session import SolverSession
from plans.plan import Objective, SolveStatus, Strategy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a strategy found."""

    status: SolveStatus
    goal: Goal
    """The first key; `value` and `bound` are measured by it."""
    solver: str
    solver_version: str
    certified_by: str | None
    assignment: Assignment | None = None
    value: Fraction | None = None
    bound: Fraction | None = None
    best_time: int | None = None
    """For `mixed`: the least time alone, in ticks as `evaluate.Value.time`."""
    best_share: Fraction | None = None


def run_strategy(
    problem: Problem,
    *,
    strategy: Strategy,
    objective: Objective,
    session: SolverSession,
    weight: float = 0.5,
    given: Assignment | None = None,
) -> Outcome:
    """Find the best plan by a strategy.

    Args:
        problem: as built; `uniform` puts its own rules on it.
        weight: what time weighs in `mixed`, from 0 to 1.
        given: a complete chain for `custom`; it is only checked.

    Returns:
        The outcome; without an assignment, its status says whether there is no plan or none was found in time.
    """
    if given is not None:
        return _check_given(problem, given, objective)
    if strategy == "uniform":
        return _single(uniform_problem(problem), Goal("time", objective), session)
    if strategy == "memory":
        return _memory(problem, objective, session)
    if strategy == "mixed":
        return _mixed(problem, objective, session, Fraction(weight))
    return _compute(problem, objective, session)


def _check_given(problem: Problem, given: Assignment, objective: Objective) -> Outcome:
    goal = Goal("time", objective)
    if violations(problem, given):
        return Outcome("infeasible", goal, "none", "none", None)
    worth = evaluate(problem, given, objective=objective)
    value = goal.value(time=worth.time, share=worth.share)
    return Outcome("given", goal, "none", "none", None, given, value, value)


def _single(problem: Problem, goal: Goal, session: SolverSession) -> Outcome:
    return _outcome(goal, minimise(problem, goal, session=session))


def _outcome(goal: Goal, settled: Settled, *, chosen: Assignment | None = None) -> Outcome:
    return Outcome(
        settled.status, goal, settled.solver, settled.solver_version, settled.certified_by,
        chosen or settled.assignment, settled.value, settled.bound,
    )  # fmt: skip


def _compute(problem: Problem, objective: Objective, session: SolverSession) -> Outcome:
    goal = Goal("time", objective)
    first = minimise(problem, goal, session=session)
    if first.assignment is None or first.value is None or first.status != "optimal":
        return _outcome(goal, first)
    second = minimise(problem, Goal("share", objective, max_time=int(first.value)), session=session)
    return _outcome(goal, first, chosen=_not_worse(problem, goal, first, second))


def _memory(problem: Problem, objective: Objective, session: SolverSession) -> Outcome:
    goal = Goal("share", objective)
    first = minimise(problem, goal, session=session)
    if first.assignment is None or first.value is None:
        return _outcome(goal, first)
    second = minimise(problem.with_share_limit(first.value), Goal("time", objective), session=session)
    return _outcome(goal, first, chosen=_not_worse(problem, goal, first, second))


def _not_worse(problem: Problem, goal: Goal, first: Settled, second: Settled) -> Assignment | None:
    """The second key's plan, unless rounding in the solver made it lose on the first key."""
    if second.assignment is None or first.value is None:
        return first.assignment
    worth = evaluate(problem, second.assignment, objective=goal.objective)
    is_as_good = goal.value(time=worth.time, share=worth.share) <= first.value
    return second.assignment if is_as_good else first.assignment


def _mixed(problem: Problem, objective: Objective, session: SolverSession, weight: Fraction) -> Outcome:
    time_goal, share_goal = Goal("time", objective), Goal("share", objective)
    fastest = minimise(problem, time_goal, session=session)
    if fastest.value is None or fastest.assignment is None:
        return _outcome(time_goal, fastest)
    smallest = minimise(problem, share_goal, session=session)
    if smallest.value is None or smallest.assignment is None:
        return _outcome(time_goal, fastest)
    best_time, best_share = int(fastest.value), smallest.value
    goal = Goal("mixed", objective, weight=weight, best_time=best_time, best_share=best_share)
    answer = minimise(problem, goal, session=session)
    outcome = _outcome(goal, _best_seen(problem, goal, answer, fastest, smallest))
    return replace(outcome, best_time=best_time, best_share=best_share)


def _best_seen(problem: Problem, goal: Goal, answer: Settled, *others: Settled) -> Settled:
    """Where the time was up, one of the single-objective plans may be better than what was found."""
    best = answer
    for other in others:
        assert other.assignment is not None
        worth = evaluate(problem, other.assignment, objective=goal.objective)
        value = goal.value(time=worth.time, share=worth.share)
        if answer.status != "optimal" and (best.value is None or value < best.value):
            best = replace(answer, status="feasible", assignment=other.assignment, value=value)
    return best
