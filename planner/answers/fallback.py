"""A plan at any rate: where the time is up, the best chain over a few fixed orders of the devices."""

import time
from dataclasses import replace
from fractions import Fraction

from planner.problem.evaluate import evaluate
from planner.problem.goal import Goal
from planner.problem.problem import Assignment, Problem, StageChoice
from planner.proof.certificate import certify


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

    def move(matrix: tuple[tuple[int | None, ...], ...]) -> tuple[tuple[int | None, ...], ...]:
        return tuple(tuple(matrix[a][b] for b in order) for a in order)

    return replace(
        problem,
        devices=tuple(problem.devices[d] for d in order),
        decode_hop=move(problem.decode_hop),
        return_hop=move(problem.return_hop),
        prefill_hop=tuple(move(matrix) for matrix in problem.prefill_hop),
        keep_order=True,
    )
