"""What a solver says, as plain data that crosses a process boundary."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from planner.problem.problem import Assignment

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
