"""How much fits: the largest context, and the most requests in flight, for a given cut and for any cut at all."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from planner.answers.settle import minimise
from planner.problem.build import unit_bytes
from planner.problem.evaluate import violations
from planner.problem.goal import Goal
from planner.problem.problem import Assignment, Problem, StageChoice
from planner.problem.question import Question
from planner.problem.uniform import uniform_problem
from planner.program.session import SolverSession
from planner.proof.feasible import has_plan
from plans.errors import InfeasibleError
from plans.plan import Plan

CapacityKey = Literal["context_tokens", "requests_in_flight"]
CEILINGS: dict[CapacityKey, int] = {"context_tokens": 2**31, "requests_in_flight": 65536}
"""What a workload may ask for at most."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest value of one number of the workload, everything else as planned."""

    key: CapacityKey
    planned: int
    this_cut: int
    """The most that the plan's own cut holds."""
    any_cut: int
    """The most that some cut over these devices holds."""
    proved_by: tuple[str, ...]
    """Who proved that one more fits no cut; empty where `any_cut` is the ceiling."""


def measure_capacity(plan: Plan, key: CapacityKey, *, session: SolverSession) -> Capacity:
    """Find by bisection how far a number of the workload may rise; memory grows with it, nothing else matters.

    Args:
        plan: the cut to ask about.
        key: which number.

    Raises:
        InfeasibleError: the session's time was up before an answer was proved.
    """
    question = Question.of(plan)
    problem = question.problem()
    problem = uniform_problem(problem) if plan.strategy == "uniform" else problem
    chain = chain_of(plan)

    def changed(value: int) -> Problem:
        workload = plan.workload.model_copy(update={key: value})
        return replace(problem, units=unit_bytes(plan.profile, workload))

    now, most = getattr(plan.workload, key), CEILINGS[key]
    this_cut = _largest(lambda n: not violations(changed(n), chain), least=now, most=most)
    if question.terms.given is not None:
        return Capacity(key, now, this_cut, this_cut, () if this_cut == most else ("the exact check of the cut",))
    any_cut = _largest(lambda n: _has_plan(changed(n), session), least=this_cut, most=most)
    return Capacity(key, now, this_cut, any_cut, () if any_cut == most else _refute(changed(any_cut + 1), session))


def chain_of(plan: Plan) -> Assignment:
    """Return a plan's stages as device numbers."""
    numbers = {device.name: index for index, device in enumerate(plan.cluster.devices)}
    return tuple(StageChoice(numbers[stage.device], stage.start_layer, stage.end_layer) for stage in plan.stages)


def _largest(is_allowed: Callable[[int], bool], *, least: int, most: int) -> int:
    """Return the largest allowed number; `least` is known to be allowed, and more is never easier."""
    low, step = least, 1
    while low + step <= most and is_allowed(low + step):
        low, step = low + step, step * 2
    undecided = range(low + 1, min(low + step, most + 1))
    return low + bisect_left(undecided, x=True, key=lambda n: not is_allowed(n))


def _has_plan(problem: Problem, session: SolverSession) -> bool:
    known = has_plan(problem)
    if known is not None:
        return known
    status = minimise(problem, Goal("time", "latency"), session=session).status
    if status == "time_limit":
        raise InfeasibleError(
            "the time was up before the largest workload was found", hint="raise --time-limit", code="E-TIME"
        )
    return status != "infeasible"


def _refute(problem: Problem, session: SolverSession) -> tuple[str, ...]:
    """Return who proves that a problem has no plan; `planner.proof.feasible`, which said so first, where time is up."""
    settled = minimise(problem, Goal("time", "latency"), session=session)
    assert settled.assignment is None, "a plan was found where none was thought to exist"
    solver = () if settled.solver == "none" or settled.status != "infeasible" else (settled.solver,)
    return solver + ((settled.certified_by,) if settled.certified_by else ()) or ("an exact count of the memory",)
