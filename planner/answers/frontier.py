"""The Pareto frontier: how much time a smaller memory share, or fewer devices, would cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from planner.answers.strategies import Outcome, run_strategy
from planner.problem.evaluate import evaluate
from planner.problem.problem import Problem
from planner.program.session import SolverSession
from plans.plan import Objective, SolveStatus
from plans.stages import StageRange


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One plan that nothing beats on both sides."""

    seconds: float
    memory_share: float
    stages: tuple[StageRange, ...]
    status: SolveStatus
    certified_by: str | None

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return len(self.stages)


def frontier_by_share(
    problem: Problem, *, objective: Objective, session: SolverSession, num_points: int = 9
) -> list[FrontierPoint]:
    """Return points between the smallest memory share and the least time, by increasing share.

    For evenly spaced limits on the share: the least time, and of the plans that take it the smallest share. So every
    point lies on the frontier; between two of them there may be more.
    """
    smallest = _run(problem, "memory", objective, session)
    fastest = _run(problem, "compute", objective, session)
    if smallest.assignment is None or fastest.assignment is None:
        return []
    low = evaluate(problem, smallest.assignment, objective=objective).share
    high = evaluate(problem, fastest.assignment, objective=objective).share
    outcomes = [smallest, fastest]
    for step in range(1, num_points - 1):
        limit = low + (high - low) * Fraction(step, num_points - 1)
        outcomes.append(_run(problem.with_share_limit(limit), "compute", objective, session))
    points = [_point(problem, outcome, objective) for outcome in outcomes if outcome.assignment is not None]
    return _undominated(points)


def frontier_by_devices(problem: Problem, *, objective: Objective, session: SolverSession) -> list[FrontierPoint]:
    """Return the least time with at most 1, 2, 3, ... devices, as long as one more helps."""
    best = _run(problem, "compute", objective, session)
    if best.assignment is None:
        return []
    points: list[FrontierPoint] = []
    for most in range(1, len(best.assignment)):
        outcome = _run(replace(problem, max_stages=most), "compute", objective, session)
        if outcome.assignment is not None:
            points.append(_point(problem, outcome, objective))
    points.append(_point(problem, best, objective))
    kept: list[FrontierPoint] = []
    for point in points:
        if not kept or point.seconds < kept[-1].seconds:
            kept.append(point)
    return kept


def _run(problem: Problem, strategy: str, objective: Objective, session: SolverSession) -> Outcome:
    return run_strategy(
        problem, strategy="memory" if strategy == "memory" else "compute", objective=objective, session=session
    )


def _point(problem: Problem, outcome: Outcome, objective: Objective) -> FrontierPoint:
    assert outcome.assignment is not None
    worth = evaluate(problem, outcome.assignment, objective=objective)
    return FrontierPoint(
        seconds=problem.seconds(worth.time, objective),
        memory_share=float(worth.share),
        stages=problem.ranges(outcome.assignment),
        status=outcome.status,
        certified_by=outcome.certified_by,
    )


def _undominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Sort by share and drop what is no faster than a point with a smaller share (found out of time, or twice)."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.memory_share, p.seconds)):
        if not kept or point.seconds < kept[-1].seconds:
            kept.append(point)
    return kept
