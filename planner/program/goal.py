"""What an integer program minimises: time, the largest share of memory, or both weighed."""

from collections.abc import Callable
from typing import Any

import pulp

from planner.problem.goal import Goal

Expression = Any
"""pulp ships no types."""


def add_goal(
    lp: Any, goal: Goal, *, unit: float, time: Callable[[], Expression], share: Callable[[], Expression]
) -> None:
    """Add the objective, and the limit on the first key where the share is the second.

    Args:
        lp: the program, its variables and constraints added.
        goal: what to minimise.
        unit: solver time units per tick.
        time: adds what the chain's time needs, and returns it in solver time units; called if the goal asks for it.
        share: the same for the largest used/budget over the stages.
    """
    seconds = time() if goal.kind != "share" or goal.max_time is not None else pulp.LpAffineExpression()
    if goal.max_time is not None:
        # The first key may not get worse; the margin is the solver's own accuracy, the answer is checked exactly.
        lp += seconds <= goal.max_time * unit * (1 + 1e-9)
    if goal.kind == "time":
        lp.setObjective(seconds)
        return
    largest = share()
    if goal.kind == "share":
        lp.setObjective(100 * largest)
        return
    weight = float(goal.weight)
    time_scale = 100 * weight / (goal.best_time * unit) if goal.best_time else 0.0
    share_scale = 100 * (1 - weight) / float(goal.best_share) if goal.best_share else 0.0
    lp.setObjective(time_scale * seconds + share_scale * largest)
