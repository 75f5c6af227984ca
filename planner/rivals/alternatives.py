"""What else could be done than a given plan: other strategies, other engines, a smaller memory share, fewer devices."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.answers.frontier import FrontierPoint, frontier_by_devices, frontier_by_share
from planner.problem.question import Question
from planner.program.effort import USUAL, Effort
from planner.rivals.compare import Comparison, compare
from planner.rivals.rules import Split
from plans.plan import Plan


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Everything a plan can be held against."""

    comparison: Comparison
    """The plan itself is its first row."""
    by_share: tuple[FrontierPoint, ...] = ()
    """The least time for a memory share, by increasing share."""
    by_devices: tuple[FrontierPoint, ...] = ()
    """The least time with at most so many devices."""


def compare_plan(plan: Plan, effort: Effort = USUAL, *, partitions: Iterable[tuple[str, Split]] = ()) -> Comparison:
    """Answer a plan's own question by every strategy and rule, under its demands; the plan itself is the first row.

    Only a cut by hand is not demanded of the strategies; arguments and errors as `planner.rivals.compare.compare`.
    """
    given = [*partitions, ("this plan", Split("this plan", plan.ranges))]
    comparison = compare(Question.of(plan), effort, partitions=given)
    return replace(comparison, rows=(comparison.rows[-1], *comparison.rows[:-1]))


def alternatives_to(plan: Plan, effort: Effort = USUAL) -> Alternatives:
    """Answer a plan's own question in every other way, as `compare_plan`, and with less memory or fewer devices.

    Args:
        effort: for each strategy, and for each of the two frontiers.

    Raises:
        MachineError: no solver works here.
    """
    problem = Question.of(plan).by("compute").problem()
    with effort.session() as session:
        by_share = frontier_by_share(problem, objective=plan.objective, session=session)
    with effort.session() as session:
        by_devices = frontier_by_devices(problem, objective=plan.objective, session=session)
    return Alternatives(compare_plan(plan, effort), tuple(by_share), tuple(by_devices))
