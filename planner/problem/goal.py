"""What is minimised, as plain data shared by the solver, the certificate and the tests."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from planner.problem.problem import Assignment, Ticks
from plans.plan import Objective

GoalKind = Literal["time", "share", "mixed"]


@dataclass(frozen=True, slots=True)
class Goal:
    """One number to minimise.

    Args:
        kind: the time objective, the largest memory share, or their weighted sum
            weight * time / best_time + (1 - weight) * share / best_share.
        objective: which time is meant.
        max_time: no slower than this (ticks, as `evaluate.Value.time`); the first key when the share is the second.
        weight, best_time, best_share: for `mixed` alone.
    """

    kind: GoalKind
    objective: Objective
    max_time: Ticks | None = None
    weight: Fraction = Fraction(1, 2)
    best_time: Ticks = 1
    best_share: Fraction = Fraction(1)

    def value(self, *, time: Ticks, share: Fraction) -> Fraction:
        """Return the number that is minimised: ticks, a share, or the weighted sum."""
        if self.kind == "mixed":
            # A best of zero (nothing to compute) leaves nothing to weigh on that side.
            time_term = Fraction(time, self.best_time) if self.best_time else Fraction(0)
            share_term = share / self.best_share if self.best_share else Fraction(0)
            return self.weight * time_term + (1 - self.weight) * share_term
        return Fraction(time) if self.kind == "time" else share


SolverName = Literal["highs", "cbc"]
IlpStatus = Literal["optimal", "feasible", "infeasible", "time_limit"]


@dataclass(frozen=True, slots=True)
class IlpAnswer:
    """What the solver found; `value` and `bound` as `Goal.value` counts."""

    status: IlpStatus
    solver: str
    solver_version: str
    assignment: Assignment | None = None
    value: Fraction | None = None
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class SolverFault:
    """No solver gave an answer: they are missing or crash, or (is_wrong) what they say cannot be."""

    text: str
    is_wrong: bool
