"""What else could be done than a given plan: other strategies, other engines, a smaller memory share, fewer devices."""

from dataclasses import dataclass, replace

from planner.answers.frontier import FrontierPoint, frontier_by_devices, frontier_by_share
from planner.answers.solve import stage_ranges
from planner.problem.build import build_problem
from planner.problem.problem import Problem
from planner.program.session import SolverSession
from planner.rivals.compare import Comparison, compare, stages_of
from planner.rivals.rules import Split
from planner.timing.costs import StageRange
from plans.plan import Plan, SolveStatus


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


def alternatives_to(plan: Plan, *, time_limit: float | None, is_isolated: bool = True) -> Alternatives:
    """Answer a plan's own question (model, devices, workload, objective) in every other way.

    Args:
        time_limit: seconds for each strategy, and for each of the two frontiers.
        is_isolated: as `planner.answers.solve.solve`.

    Raises:
        MachineError: no solver works here.
    """
    comparison = _comparison(plan, time_limit, is_isolated=is_isolated)
    problem = build_problem(
        plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution
    )  # without the demands the plan may have been made under: a plan does not record them
    found: list[tuple[Option, ...]] = []
    for frontier in (frontier_by_share, frontier_by_devices):
        with SolverSession(time_limit=time_limit, is_isolated=is_isolated) as session:
            points = frontier(problem, objective=plan.objective, session=session)
        found.append(tuple(_option(problem, point) for point in points))
    return Alternatives(comparison, *found)


def _comparison(plan: Plan, time_limit: float | None, *, is_isolated: bool) -> Comparison:
    found = compare(
        plan.profile,
        cluster=plan.cluster,
        workload=plan.workload,
        objective=plan.objective,
        weight=0.5 if plan.mixed_weight is None else plan.mixed_weight,
        execution=plan.execution,
        partitions=[("this plan", Split("this plan", stages_of(plan)))],
        time_limit=time_limit,
        is_isolated=is_isolated,
    )
    return replace(found, rows=(found.rows[-1], *found.rows[:-1]))


def _option(problem: Problem, point: FrontierPoint) -> Option:
    return Option(point.seconds, point.memory_share, stage_ranges(problem, point.assignment), point.status)
