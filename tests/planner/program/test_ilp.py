"""The integer programs against brute force; HiGHS against CBC."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from planner.problem.goal import Goal
from planner.problem.problem import Problem, ProblemDevice, UnitBytes, UnitTicks
from planner.program import solve as ilp
from plans.plan import Objective
from tests.planner.random_problems import MILLISECOND, all_values, brute_force, random_problem

OBJECTIVES: tuple[Objective, ...] = ("latency", "request", "throughput")


def _goals(rng: random.Random, objective: Objective) -> list[Goal]:
    weight = Fraction(rng.randint(0, 4), 4)
    mixed = Goal("mixed", objective, weight=weight, best_time=7 * MILLISECOND, best_share=Fraction(1, 2))
    return [Goal("time", objective), rng.choice([Goal("share", objective), mixed])]


@pytest.mark.parametrize("seed", range(10))
def test_program_is_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
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
    answer = ilp.solve_ilp(problem, goal, solvers=("highs",))
    assert answer.status == ("infeasible" if expected is None else "optimal"), problem
    assert answer.value == expected, problem


def test_both_programs_agree_on_identical_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(40)
    for _ in range(25):
        problem = random_problem(rng, max_layers=5, max_devices=4)
        if not problem.has_identical_layers:
            continue
        for goal in (Goal("time", "latency"), Goal("time", "throughput"), Goal("share", "latency")):
            by_counts = ilp.solve_ilp(problem, goal, solvers=("highs",))
            with monkeypatch.context() as patch:
                patch.setattr(Problem, "has_identical_layers", False)
                by_layers = ilp.solve_ilp(replace(problem), goal, solvers=("highs",))
            assert by_counts.value == by_layers.value


def test_highs_and_cbc_agree() -> None:
    rng = random.Random(77)
    for _ in range(12):
        problem = random_problem(rng, max_layers=5, max_devices=3)
        for goal in (Goal("time", "latency"), Goal("share", "latency")):
            highs, cbc = (ilp.solve_ilp(problem, goal, solvers=(name,)) for name in ("highs", "cbc"))
            assert (highs.status, highs.value) == (cbc.status, cbc.value)
            assert (highs.solver, cbc.solver) == ("HiGHS", "CBC")


def test_exact_fit_is_a_plan_and_one_byte_less_is_none() -> None:
    rng = random.Random(11)
    for _ in range(30):
        problem = random_problem(rng, max_layers=4, max_devices=2, is_plain=True)
        smallest = ilp.solve_ilp(problem, Goal("share", "latency"), solvers=("highs",))
        if smallest.value is None:
            continue
        exact = problem.with_share_limit(smallest.value)
        short = problem.with_share_limit(smallest.value, is_strict=True)
        assert ilp.solve_ilp(exact, Goal("time", "latency"), solvers=("highs",)).status == "optimal"
        assert ilp.solve_ilp(short, Goal("time", "latency"), solvers=("highs",)).status == "infeasible"


@pytest.mark.parametrize("bytes_per_layer", [1, 10**6, 10**9 + 7, 10**12])
@pytest.mark.parametrize("ticks_per_layer", [3, 10**6, 10**12 + 1])
def test_sizes_of_any_magnitude_give_exact_answers(bytes_per_layer: int, ticks_per_layer: int) -> None:
    # 5 layers on devices of 3 and 2 layers to the byte; the other one is 2 bytes short of holding 3
    times = [UnitTicks(0, (ticks_per_layer * speed,) * 5, 0) for speed in (2, 1, 3)]
    budgets = [3 * bytes_per_layer, 3 * bytes_per_layer - 1, 2 * bytes_per_layer]
    devices = tuple(ProblemDevice(f"d{i}", b, 0, b, t) for i, (b, t) in enumerate(zip(budgets, times, strict=True)))
    pause = ticks_per_layer // 3
    hop = tuple(tuple(None if a == b else pause for b in range(3)) for a in range(3))
    back = tuple((0,) * 3 for _ in range(3))
    problem = Problem(devices, UnitBytes(0, (bytes_per_layer,) * 5, 0), hop, back)
    answer = ilp.solve_ilp(problem, Goal("time", "latency"), solvers=("highs",))
    room_on_fast = budgets[1] // bytes_per_layer
    assert answer.value == ticks_per_layer * (room_on_fast + 2 * (5 - room_on_fast)) + pause


@pytest.mark.row("L13")
def test_times_of_any_scale_reach_the_solver_as_ordinary_numbers() -> None:
    rng = random.Random(2)
    for _ in range(20):
        problem = random_problem(rng)
        for factor in (1, 10**4, 10**9):
            layers = [tuple(t * factor for t in d.decode.layers) for d in problem.devices]
            devices = tuple(
                replace(d, decode=UnitTicks(0, times, 0)) for d, times in zip(problem.devices, layers, strict=True)
            )
            unit = ilp.solver_unit(replace(problem, devices=devices), Goal("time", "latency"))
            typical = sum(min(column) for column in zip(*layers, strict=True)) * unit
            assert typical == 0 or 1 <= typical <= 1e4


def test_a_gap_is_reported_as_feasible_with_a_bound() -> None:
    rng = random.Random(9)
    statuses = set()
    for _ in range(20):
        problem = random_problem(rng, max_layers=6, max_devices=4, is_plain=True)
        exact = ilp.solve_ilp(problem, Goal("time", "latency"), solvers=("highs",))
        loose = ilp.solve_ilp(problem, Goal("time", "latency"), solvers=("highs",), mip_gap=0.5)
        statuses.add(loose.status)
        if exact.value is None or loose.value is None or loose.bound is None:
            continue
        assert loose.bound <= float(exact.value) * (1 + 1e-9) + 1e-9
        assert exact.value <= loose.value <= exact.value * Fraction(21, 10)
    assert "optimal" in statuses


def test_answers_that_break_the_problem_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    # A capacity that is one layer too large stands for a solver that leaves a row violated.
    from planner.program import counts as ilp_counts

    honest = ilp_counts.max_layers
    monkeypatch.setattr(ilp_counts, "max_layers", lambda *a, **k: honest(*a, **k) + 1)
    budget = 20
    devices = tuple(ProblemDevice(f"d{i}", budget, 0, budget, UnitTicks(0, (5 + i,) * 4, 0)) for i in range(2))
    hop = ((None, 1), (1, None))
    problem = Problem(devices, UnitBytes(0, (7,) * 4, 0), hop, ((0, 0), (0, 0)))
    with pytest.raises(ilp.SolverFaultError, match="do not fit"):
        ilp.solve_ilp(problem, Goal("time", "latency"))


@pytest.mark.row("L14")
def test_unbounded_and_undefined_are_faults_and_never_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    import highspy

    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda _self: highspy.HighsModelStatus.kUnboundedOrInfeasible)
    problem = random_problem(random.Random(4))
    with pytest.raises(ilp.SolverFaultError, match="unbounded"):
        ilp.solve_ilp(problem, Goal("time", "latency"), solvers=("highs",))


def test_a_pipelined_prefill_is_bounded_from_below() -> None:
    rng = random.Random(21)
    seen = 0
    while seen < 25:
        problem = replace(random_problem(rng, max_layers=4, max_devices=3), execution="process_per_stage")
        if len(problem.prefill_hop) < 2:
            continue
        seen += 1
        goal = Goal("time", "request")
        best = brute_force(all_values(problem, "request"), goal)
        answer = ilp.solve_ilp(problem, goal, solvers=("highs",))
        if best is None:
            assert answer.status == "infeasible"
            continue
        assert answer.value is not None
        assert answer.bound is not None
        assert answer.bound <= float(best) * (1 + 1e-9) + 1
        assert answer.value >= best
        assert answer.status == "feasible" or answer.value == best
