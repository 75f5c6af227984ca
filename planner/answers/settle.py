"""Solver and certificate side by side: what is known when both have spoken, and what to do when they disagree."""

import time
from dataclasses import dataclass, replace
from fractions import Fraction

from planner.problem.evaluate import evaluate
from planner.problem.goal import Goal, IlpAnswer
from planner.problem.problem import Assignment, Matrix, Problem, StageChoice
from planner.program.session import SolverSession
from planner.proof.certificate import Certificate, certify
from plans.errors import LlamaplanError
from plans.plan import SolveStatus


def quick_plan(problem: Problem, goal: Goal, *, deadline: float) -> tuple[Assignment, Fraction] | None:
    """Return a plan and its value, or None if none of the orders has one in time (which proves nothing).

    The devices are lined up as given, the fastest first and the largest first; in each line the cheapest chain is
    found by dynamic programming.
    """
    best: tuple[Assignment, Fraction] | None = None
    for order in _orders(problem):
        lined_up = reordered(problem, order)
        wanted = Goal("share" if goal.kind == "share" else "time", "latency")
        found = certify(lined_up, wanted, time_limit=deadline - time.monotonic())
        if found is None or found.assignment is None:
            continue
        chain = tuple(StageChoice(order[s.device], s.start, s.end) for s in found.assignment)
        worth = evaluate(problem, chain, objective=goal.objective)
        value = goal.value(time=worth.time, share=worth.share)
        is_allowed = goal.max_time is None or worth.time <= goal.max_time
        if is_allowed and (best is None or value < best[1]):
            best = chain, value
    return best


def _orders(problem: Problem) -> list[tuple[int, ...]]:
    given = tuple(range(problem.num_devices))
    if problem.keep_order:
        return [given]
    fastest = sorted(given, key=lambda d: sum(problem.devices[d].decode.layers))
    largest = sorted(given, key=lambda d: -problem.devices[d].limit_bytes)
    return list(dict.fromkeys((given, tuple(fastest), tuple(largest))))


def reordered(problem: Problem, order: tuple[int, ...]) -> Problem:
    """Return the problem with its devices in another order, which is then kept."""

    def move(matrix: Matrix) -> Matrix:
        return tuple(tuple(matrix[a][b] for b in order) for a in order)

    return replace(problem.with_hops(move), devices=tuple(problem.devices[d] for d in order), keep_order=True)


_ACCURACY = Fraction(1, 1_000_000)
"""How far below its own optimum a solver's rounding may hide a better plan."""


@dataclass(frozen=True, slots=True)
class Settled:
    """One goal, answered: `value` and `bound` as `Goal.value` counts; no assignment where there is no plan."""

    status: SolveStatus
    solver: str
    solver_version: str
    certified_by: str | None
    assignment: Assignment | None = None
    value: Fraction | None = None
    bound: Fraction | None = None


def minimise(problem: Problem, goal: Goal, *, session: SolverSession) -> Settled:
    """Solve one goal by the integer program and prove it again.

    Raises:
        LlamaplanError: solver and certificate each proved another optimum; one of them is wrong.
        MachineError: no solver works here.
    """
    answer, certificate = session.ask(problem, goal, lambda: certify(problem, goal, time_limit=session.seconds_left))
    if certificate is None:
        return _with_fallback(problem, goal, _alone(answer), deadline=session.overtime_deadline)
    if not _agree(answer, certificate):
        # A solver that is wrong by itself is often right without presolve, or is outvoted by the other one.
        answer, _ = session.ask(problem, goal, lambda: None, is_second_opinion=True)
        if not _agree(answer, certificate):
            raise _disagreement(goal, answer, certificate)
    return _together(answer, certificate)


def _with_fallback(problem: Problem, goal: Goal, settled: Settled, *, deadline: float) -> Settled:
    """Where the time was up, a plan found quickly is better than none, and may be better than the solver's."""
    if settled.status not in ("time_limit", "feasible"):
        return settled
    quick = quick_plan(problem, goal, deadline=deadline)
    if quick is None or (settled.value is not None and settled.value <= quick[1]):
        return settled
    return replace(settled, status="feasible", assignment=quick[0], value=quick[1])


def _alone(answer: IlpAnswer) -> Settled:
    bound = answer.value if answer.status == "optimal" else None if answer.bound is None else Fraction(answer.bound)
    if bound is not None and answer.value is not None:
        bound = min(bound, answer.value)
    return Settled(answer.status, answer.solver, answer.solver_version, None, answer.assignment, answer.value, bound)


def _together(answer: IlpAnswer, certificate: Certificate) -> Settled:
    """What both say; a solver that was stopped before its proof is not named.

    Of equally good plans the certificate's is taken, so that ties do not depend on the solver, its version or its time.
    """
    has_proved = answer.status in ("optimal", "infeasible")
    solver, version = (answer.solver, answer.solver_version) if has_proved else ("none", "none")
    value = certificate.value
    status: SolveStatus = "infeasible" if value is None else "optimal"
    return Settled(status, solver, version, certificate.method, certificate.assignment, value, value)


def _agree(answer: IlpAnswer, certificate: Certificate) -> bool:
    """Whether both can be true: a plan that was checked exactly refutes a proof that there is none as good."""
    if certificate.value is None:
        return answer.assignment is None
    if answer.status == "infeasible":
        return False
    if answer.value is None:
        return True
    if answer.value < certificate.value:
        return False
    return answer.status != "optimal" or answer.value - certificate.value <= _ACCURACY * abs(answer.value)


def _disagreement(goal: Goal, answer: IlpAnswer, certificate: Certificate) -> LlamaplanError:
    def number(value: Fraction | None) -> str:
        return "no plan" if value is None else repr(float(value))

    return LlamaplanError(
        f"{answer.solver} {answer.solver_version} proves {number(answer.value)} and {certificate.method} proves "
        f"{number(certificate.value)} as the least {goal.kind}",
        hint="this is a bug of ours; please report it with the model and the cluster",
        code="E-PROOF",
    )
