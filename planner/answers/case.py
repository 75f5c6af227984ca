"""A question that has no plan, and the ways to ask it again with one thing changed."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from planner.problem.build import unit_bytes
from planner.problem.evaluate import violations
from planner.problem.problem import Assignment, Matrix, Problem, ProblemDevice
from planner.problem.question import Question
from planner.problem.uniform import uniform_problem
from planner.proof.feasible import has_plan

MOST_BYTES = 1 << 60
_SECONDS = 5.0
"""Looking for advice stops after this; what was found until then is given."""


@dataclass(frozen=True)
class Case:
    """A question that has no plan, and how long to look for advice."""

    question: Question
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    @cached_property
    def problem(self) -> Problem:
        """The question in integers."""
        return self.question.problem()

    @cached_property
    def given(self) -> Assignment | None:
        """The complete chain that was demanded, if any."""
        return self.question.terms.given

    def fits(self, problem: Problem) -> bool:
        """Return whether a changed problem is known to have a plan by this strategy."""
        if self.given is not None:
            return not violations(problem, self.given)
        changed = uniform_problem(problem) if self.question.strategy == "uniform" else problem
        return has_plan(changed) is True

    def fits_workload(self, **changes: object) -> bool:
        """Return whether another workload has a plan on the same devices."""
        workload = self.question.workload.model_copy(update=changes)
        return self.fits(replace(self.problem, units=unit_bytes(self.question.profile, workload)))

    @property
    def is_over(self) -> bool:
        """Whether the time for advice is up."""
        return time.monotonic() > self.deadline


@dataclass(frozen=True, slots=True)
class Shortage:
    """The device that needs the fewest bytes more, alone, for a plan to exist."""

    device: int
    num_bytes: int


def least_shortage(case: Case) -> Shortage | None:
    best: Shortage | None = None
    tried: list[ProblemDevice] = []
    for index, device in enumerate(case.problem.devices):
        # Interchangeable devices are short by the same amount, except where their place in the order matters.
        is_known = not case.problem.keep_order and replace(device, name="") in tried
        if is_known or device.rule.is_banned or case.is_over:
            continue
        tried.append(replace(device, name=""))
        most = MOST_BYTES if best is None else best.num_bytes - 1
        extra = smallest(partial(_fits_with_more, case, index), most=most)
        best = Shortage(index, extra) if extra is not None else best
    return best


def _fits_with_more(case: Case, index: int, num_bytes: int) -> bool:
    return case.fits(with_more(case.problem, index, num_bytes))


def with_more(problem: Problem, index: int, num_bytes: int) -> Problem:
    device = problem.devices[index]
    more = replace(device, limit_bytes=device.limit_bytes + num_bytes, budget_bytes=device.budget_bytes + num_bytes)
    return replace(problem, devices=(*problem.devices[:index], more, *problem.devices[index + 1 :]))


def smallest(is_enough: Callable[[int], bool], *, most: int) -> int | None:
    """Return the smallest n from 1 to `most` that is enough, None if not even `most` is; more is never worse."""
    if most < 1 or not is_enough(most):
        return None
    return 1 + bisect_left(range(1, most), x=True, key=is_enough)


def largest(is_allowed: Callable[[int], bool], *, least: int, most: int) -> int | None:
    """Return the largest n from `least` to `most` that is allowed; more is never better."""
    if most < least or not is_allowed(least):
        return None
    return least + bisect_left(range(least + 1, most + 1), x=True, key=lambda n: not is_allowed(n))


def all_connected(problem: Problem) -> Problem:
    def connect(matrix: Matrix) -> Matrix:
        return tuple(tuple(cell or 0 if a != b else cell for b, cell in enumerate(r)) for a, r in enumerate(matrix))

    return problem.with_hops(connect)
