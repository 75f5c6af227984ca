"""The ladder: the k layers that mind least in 4 bits, the others in 8, for every k; the fastest within an error budget.

Above its rungs lies the model as it is stored, without any error. Every rung is an ordinary question. They are compared
by the exact method of the certificate, and the best of them is solved with both proofs. Where 4 bits are nowhere slower
and nowhere larger than 8, what one rung can do every narrower one can do as well: then the narrowest rung within the
budget is the fastest, and only ties are left to look for. Otherwise every rung within the budget is compared.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planner.answers.explain import explain_infeasible
from planner.answers.solve import objective_seconds, solve
from planner.answers.widest import can_fit
from planner.model.widths import Packed, mixed
from planner.problem.goal import Goal
from planner.problem.problem import Problem, UnitTicks
from planner.problem.question import Question
from planner.problem.uniform import uniform_problem
from planner.program.effort import Effort
from planner.proof.certificate import certify
from plans.errors import InfeasibleError
from plans.packed.choice import WeightError
from plans.plan import Plan
from plans.sensitivity import Sensitivity

OUT_OF_TIME = "E-TIME"
ONE_TIME = ("compute", "uniform", "custom")
"""Strategies whose plans have the least time there is."""
SHOWN = 4
"""Questions that are answered in any case: the best, and the three uniform widths."""
Solve = Callable[[Question, Effort], Plan]
Progress = Callable[[int, int], None]
"""Told how many questions are answered, and of how many."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One choice of widths as a question, and what it costs."""

    name: str
    question: Question
    error: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A rung and its best plan; None where there is none, or (`is_open`) where none was found in time."""

    rung: Rung
    plan: Plan | None
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class LadderAnswer:
    """The best of the ladder, and what else was looked at."""

    best: Plan
    error: float
    budget: float
    uniform: tuple[Answered, ...]
    """The model as it is stored, all layers in 8 bits, and all in 4."""
    num_rungs: int
    num_allowed: int
    """Rungs within the budget."""
    num_solved: int
    """Of these; the others are proved to be no better."""
    is_complete: bool
    """Whether the time sufficed for all that had to be solved."""


class Ladder:
    """The rungs of one question.

    Args:
        question: the model as it is stored, with both uniform widths as its `narrower` ones.
        sensitivity: what fewer bits cost the model's layers.
        budget: the most error that is accepted.
    """

    def __init__(self, question: Question, sensitivity: Sensitivity, *, budget: float) -> None:
        self._eight, self._four = question.narrower
        self._question, self._sensitivity, self.budget = question, sensitivity, budget
        self.stored = Rung(question.profile.dtype, replace(question, narrower=()), 0.0)

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """For k = 0, 1, ... the k least sensitive layers in 4 bits."""
        order = least_sensitive(self._sensitivity)
        return tuple(self._rung(mixed(self._eight, self._four, set(order[:k]))) for k in range(len(order) + 1))

    @cached_property
    def allowed(self) -> tuple[Rung, ...]:
        """The rungs within the budget, the model as it is stored first."""
        return tuple(rung for rung in (self.stored, *self.rungs) if rung.error <= self.budget)

    @cached_property
    def is_monotone(self) -> bool:
        """Whether it is proved that a narrower rung is never slower."""
        if self._question.strategy not in ONE_TIME:
            return False
        wide, narrow = self.rungs[0].question.problem(), self.rungs[-1].question.problem()
        return never_worse(narrow, wide) and never_worse(wide, self.stored.question.problem())

    def _rung(self, found: Packed) -> Rung:
        error = self._sensitivity.expected(found.choice)
        recorded = WeightError(expected=error, budget=self.budget, sensitivity_sha256=self._sensitivity.sha256)
        choice = found.choice.model_copy(update={"error": recorded})
        return Rung(found.choice.words, self._question.packed(Packed(choice, found.profile)), error)


def least_sensitive(sensitivity: Sensitivity) -> list[int]:
    """Return the layers by what 4 bits in place of 8 cost them, the least first; of equals the first."""
    eight = sensitivity.layer_int8
    layers = range(len(sensitivity.int4))
    return sorted(layers, key=lambda index: (sensitivity.int4[index] - eight[index], index))


def never_worse(problem: Problem, other: Problem) -> bool:
    """Return whether every unit is as small and as fast, on every device, as in another problem of the same chain."""
    if problem.tick_seconds != other.tick_seconds:
        return False
    ours, theirs = problem.units, other.units
    is_smaller = all(a <= b for a, b in zip(ours.layers, theirs.layers, strict=True)) and ours.head <= theirs.head
    return is_smaller and all(_no_slower(a, b) for a, b in zip(_times(problem), _times(other), strict=True))


def _times(problem: Problem) -> list[UnitTicks]:
    devices = [times for device in problem.devices for times in (device.decode, *device.prefill)]
    return devices + [bus.units for bus in problem.buses]


def _no_slower(ours: UnitTicks, theirs: UnitTicks) -> bool:
    layers = all(a <= b for a, b in zip(ours.layers, theirs.layers, strict=True))
    return layers and ours.embedding <= theirs.embedding and ours.head <= theirs.head


def best_of_ladder(
    ladder: Ladder, effort: Effort, *, solve_one: Solve = solve, progress: Progress = lambda _done, _total: None
) -> LadderAnswer:
    """Return the fastest plan within the budget; of equally fast ones that with the least error.

    Args:
        ladder: the rungs.
        effort: for all of them together.
        solve_one: answers one question.
        progress: told how far it is.

    Raises:
        InfeasibleError: nothing within the budget has a plan (the message says which rung would), or none was found in
            time.
    """
    search = _Search(effort, solve_one, progress)
    allowed = ladder.allowed
    found = search.first_of_fastest(allowed) if ladder.is_monotone else search.fastest(allowed)
    best = None if found is None else search.answer(found)
    if best is None or best.plan is None:
        raise _nothing_found(ladder, effort, is_open=search.is_open)
    num_solved = len(search.seconds)
    uniform = tuple(search.answer(rung) for rung in (ladder.stored, ladder.rungs[0], ladder.rungs[-1]))
    return LadderAnswer(
        best.plan, best.rung.error, ladder.budget, uniform, len(ladder.rungs) + 1, len(allowed), num_solved,
        not search.is_open,
    )  # fmt: skip


class _Search:
    """Compares rungs by the least time each can have, and solves those that are shown; until the time is up."""

    def __init__(self, effort: Effort, solve_one: Solve, progress: Progress) -> None:
        self._effort, self._solve, self._progress = effort, solve_one, progress
        self._deadline = None if effort.time_limit is None else time.monotonic() + effort.time_limit
        self._answers: dict[str, Answered] = {}
        self.seconds: dict[str, float] = {}
        """The least time of rungs by their names; infinite where there is no plan, or none was found in time."""
        self.is_open = False
        """Whether the time was up before a rung was answered."""

    def answer(self, rung: Rung) -> Answered:
        """Return the best plan of a rung, proved twice."""
        if rung.name not in self._answers:
            done = len(self.seconds) + len(self._answers)
            self._progress(done, done + SHOWN - len(self._answers))
            self._answers[rung.name] = self._ask(rung)
            self.is_open |= self._answers[rung.name].is_open
        return self._answers[rung.name]

    def least_seconds(self, rung: Rung) -> float:
        """Return the time of a rung's best plan, by the exact method alone where one reaches."""
        if rung.name not in self.seconds:
            self._progress(len(self.seconds), len(self.seconds) + SHOWN)
            found = self._certified(rung.question)
            if found is None:
                plan = self.answer(rung).plan
                found = math.inf if plan is None else objective_seconds(plan)
            self.seconds[rung.name] = found
        return self.seconds[rung.name]

    def fastest(self, rungs: Sequence[Rung]) -> Rung | None:
        """Return the fastest of all rungs, of equally fast ones that with the least error; None if none has a plan."""
        best = min(rungs, key=lambda rung: (self.least_seconds(rung), rung.error))
        return best if self.least_seconds(best) < math.inf else None

    def first_of_fastest(self, rungs: Sequence[Rung]) -> Rung | None:
        """Return the same where no rung is slower than one before it: the last, or the first that ties with it."""
        least = self.least_seconds(rungs[-1])
        if least == math.inf:
            return None
        place = bisect_left(rungs, x=True, hi=len(rungs) - 1, key=lambda rung: self.least_seconds(rung) <= least)
        return rungs[place]

    def _certified(self, question: Question) -> float | None:
        if self._solve is not solve or question.strategy not in ONE_TIME or question.terms.given is not None:
            return None
        problem = question.problem()
        asked = uniform_problem(problem) if question.strategy == "uniform" else problem
        found = certify(asked, Goal("time", question.objective), time_limit=self._seconds_left)
        if found is None:
            return None
        return math.inf if found.value is None else problem.seconds(found.value, question.objective)

    @property
    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _ask(self, rung: Rung) -> Answered:
        left = self._seconds_left
        if left == 0:
            return Answered(rung, None, is_open=True)
        if can_fit(rung.question) is False:
            return Answered(rung, None)
        try:
            return Answered(rung, self._solve(rung.question, replace(self._effort, time_limit=left)))
        except InfeasibleError as error:
            return Answered(rung, None, is_open=error.code == OUT_OF_TIME)


def _nothing_found(ladder: Ladder, effort: Effort, *, is_open: bool) -> InfeasibleError:
    if is_open:
        return InfeasibleError(
            f"no plan within an error of {ladder.budget:g} was found in {effort.time_limit:g} s, and none was proved "
            "impossible",
            hint="raise --time-limit",
            code=OUT_OF_TIME,
        )
    every = sorted((ladder.stored, *ladder.rungs), key=lambda rung: rung.error)
    first = next((rung for rung in every if can_fit(rung.question)), None)
    if first is None:
        return explain_infeasible(ladder.rungs[-1].question)
    return InfeasibleError(
        f"no plan within an error of {ladder.budget:g} fits; the first that does has layers in {first.name} and an "
        f"expected error of {first.error:.4g}",
        where=ladder.stored.question.profile.model.name,
        hint=f"--max-error {rounded_up(first.error):g} would do",
    )


def rounded_up(value: float) -> float:
    """Return a number of three digits that is no less.

    >>> rounded_up(0.0123401)
    0.0124
    """
    scale = 10.0 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return math.ceil(value / scale) * scale
