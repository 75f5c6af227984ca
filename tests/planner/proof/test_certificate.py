"""The exact methods against brute force, and against each other where brute force cannot follow."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from planner.problem.goal import Goal
from planner.problem.problem import Problem, chain_costs
from planner.proof import counts as exact_counts
from planner.proof import order as exact_order
from planner.proof import positions as exact_positions
from planner.proof.certificate import certify, method_for
from planner.proof.tables import Limits, return_classes, window_minima
from plans.plan import Objective
from tests.planner.random_problems import MILLISECOND, all_values, brute_force, random_problem
from tests.planner.worth import is_allowed, worth_of

OBJECTIVES: tuple[Objective, ...] = ("latency", "request", "throughput")


def _goals(rng: random.Random, objective: Objective) -> list[Goal]:
    weight = Fraction(rng.randint(0, 4), 4)
    mixed = Goal("mixed", objective, weight=weight, best_time=7 * MILLISECOND, best_share=Fraction(1, 2))
    return [Goal("time", objective), Goal("share", objective), mixed]


@pytest.mark.parametrize("seed", range(10))
def test_certificate_is_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        problem = random_problem(rng, max_layers=5, max_devices=3, has_rules=rng.random() < 0.4)
        for objective in OBJECTIVES:
            values = all_values(problem, objective)
            for goal in _goals(rng, objective):
                _check(problem, goal, brute_force(values, goal))
            fastest = brute_force(values, Goal("time", objective))
            if fastest is not None:
                second = Goal("share", objective, max_time=int(fastest))
                _check(problem, second, brute_force(values, second))


def _check(problem: Problem, goal: Goal, expected: Fraction | None) -> None:
    certificate = certify(problem, goal)
    assert certificate is not None
    assert certificate.value == expected, problem
    if certificate.assignment is not None:
        assert is_allowed(problem, certificate.assignment)
        worth = worth_of(problem, certificate.assignment, objective=goal.objective)
        assert goal.value(time=worth.time, share=worth.share) == expected


@pytest.mark.parametrize("seed", range(6))
def test_counts_and_positions_agree_beyond_brute_force(seed: int) -> None:
    rng = random.Random(100 + seed)
    found = 0
    while found < 3:
        problem = replace(
            random_problem(rng, max_layers=20, max_devices=7, is_plain=True), max_stages=rng.choice([None, 4])
        )
        if not problem.has_identical_layers:
            continue
        found += 1
        costs = chain_costs(problem, "latency")
        counts = exact_counts.CountsSearch(problem, costs).cheapest(problem, Limits())
        positions = exact_positions.PositionsSearch(problem, costs).cheapest(problem, Limits())
        assert (counts and counts[0]) == (positions and positions[0])


def test_free_order_is_never_slower_than_a_fixed_one() -> None:
    rng = random.Random(5)
    for _ in range(40):
        free = random_problem(rng, max_layers=10, max_devices=5, is_plain=True)
        fixed = replace(free, keep_order=True)
        goal = Goal("time", "latency")
        best, bound = certify(fixed, goal), certify(free, goal)
        assert best is not None
        assert bound is not None
        if best.value is not None:
            assert bound.value is not None
            assert bound.value <= best.value


def test_methods_are_named() -> None:
    rng = random.Random(8)
    seen = set()
    for _ in range(60):
        seen.add(method_for(random_problem(rng)))
    assert seen == {exact_order.METHOD, exact_counts.METHOD, exact_positions.METHOD}


def test_too_many_unlike_devices_are_left_to_the_solver() -> None:
    problem = _wide_problem(24)
    assert method_for(problem) is None
    assert certify(problem, Goal("time", "latency")) is None
    assert method_for(replace(problem, keep_order=True)) == exact_order.METHOD


def test_certificate_gives_up_when_the_time_is_up() -> None:
    problem = replace(_wide_problem(8), keep_order=True)
    assert certify(problem, Goal("time", "latency"), time_limit=0.0) is None


def _wide_problem(num_devices: int) -> Problem:
    rng = random.Random(1)
    while True:
        small = random_problem(rng, max_layers=6, max_devices=2, is_plain=True)
        if small.has_identical_layers:
            break
    devices = tuple(
        replace(small.devices[0], name=f"d{i}", budget_bytes=1000 + i, limit_bytes=1000 + i) for i in range(num_devices)
    )
    hop = tuple(tuple(None if a == b else 5 for b in range(num_devices)) for a in range(num_devices))
    back = tuple(tuple(0 for _ in range(num_devices)) for _ in range(num_devices))
    return replace(small, devices=devices, decode_hop=hop, return_hop=back, prefill_hop=(hop,) * len(small.prefill_hop))


def test_window_minima_are_the_minima_of_windows() -> None:
    import numpy as np

    rng = random.Random(3)
    for size in (1, 2, 3, 7, 8, 20):
        values = np.array([[rng.randint(-50, 50) for _ in range(size)] for _ in range(3)], dtype=np.int64)
        low = np.array([rng.randint(-1, size) for _ in range(size)], dtype=np.int64)
        high = np.array([rng.randint(-1, size - 1) for _ in range(size)], dtype=np.int64)
        found = window_minima(values, low, high)
        for row in range(3):
            for j in range(size):
                window = values[row, max(low[j], 0) : high[j] + 1]
                assert found[row, j] == (window.min() if len(window) else 1 << 61)


def test_first_stages_with_the_same_way_back_are_merged() -> None:
    classes, table = return_classes([[None, 5, 7], [5, None, 7], [5, 5, None]])
    assert classes == [0, 0, 1]
    assert table.tolist() == [[5, 7], [5, 7], [5, 1 << 61]]
