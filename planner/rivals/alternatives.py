"""What else could be done than a given plan: other strategies, other engines, a smaller memory share, fewer devices."""

from dataclasses import dataclass, replace

from planner.answers.frontier import FrontierPoint, frontier_by_devices, frontier_by_share
from planner.problem.problem import Problem
from planner.problem.question import Question
from planner.program.effort import USUAL, Effort
from planner.rivals.compare import Comparison, compare
from planner.rivals.rules import Split
from plans.plan import Plan, SolveStatus
from plans.stages import StageRange


@dataclass(frozen=True, slots=True)
class Option:
    """One point of a frontier."""

    seconds: float
    """By the plan's objective."""
    memory_share: float
    stages: tuple[StageRange, ...]
    status: SolveStatus


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Everything a plan can be held against."""

    comparison: Comparison
    """The plan itself is its first row."""
    by_share: tuple[Option, ...] = ()
    """The least time for a memory share, by increasing share."""
    by_devices: tuple[Option, ...] = ()
    """The least time with at most so many devices."""


def alternatives_to(plan: Plan, effort: Effort = USUAL) -> Alternatives:
    """Answer a plan's own question in every other way, under its demands; only a cut by hand is not demanded again.

    Args:
        effort: for each strategy, and for each of the two frontiers.

    Raises:
        MachineError: no solver works here.
    """
    question = Question.of(plan)
    comparison = compare(question, effort, partitions=[("this plan", Split("this plan", plan.ranges))])
    comparison = replace(comparison, rows=(comparison.rows[-1], *comparison.rows[:-1]))
    problem = question.by("compute").problem()
    found: list[tuple[Option, ...]] = []
    for frontier in (frontier_by_share, frontier_by_devices):
        with effort.session() as session:
            points = frontier(problem, objective=plan.objective, session=session)
        found.append(tuple(_option(problem, point) for point in points))
    return Alternatives(comparison, *found)


def _option(problem: Problem, point: FrontierPoint) -> Option:
    return Option(point.seconds, point.memory_share, problem.ranges(point.assignment), point.status)
