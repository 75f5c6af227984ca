"""Every strategy against brute force over all orders, subsets and cuts; and what must never get worse."""

import random
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest

from planner.answers.strategies import Outcome, run_strategy
from planner.problem.goal import Goal
from planner.problem.problem import Problem, ProblemDevice, StageChoice, UnitTicks
from planner.problem.uniform import nearest_split, uniform_counts
from planner.program.session import SolverSession
from plans.plan import Objective, Strategy
from tests.planner.random_problems import MILLISECOND, all_chains, all_values, random_problem
from tests.planner.worth import Worth, is_allowed, worth_of

OBJECTIVES: tuple[Objective, ...] = ("latency", "request", "throughput")
INSTANCES = 300
LONG = 10**7 * MILLISECOND
CHUNKS = 10


def _problems(seed: int, **options: bool) -> Iterator[tuple[Problem, Objective]]:
    rng = random.Random(seed)
    for _ in range(INSTANCES // CHUNKS):
        yield random_problem(rng, max_layers=5, max_devices=3, **options), rng.choice(OBJECTIVES)


def _run(problem: Problem, strategy: Strategy, objective: Objective, *, weight: float = 0.5) -> Outcome:
    with SolverSession(("highs",), is_isolated=False) as session:
        return run_strategy(problem, strategy=strategy, objective=objective, session=session, weight=weight)


def _worth(problem: Problem, outcome: Outcome, objective: Objective) -> Worth:
    assert outcome.assignment is not None
    assert is_allowed(problem, outcome.assignment)
    assert outcome.status == "optimal"
    assert outcome.certified_by is not None
    return worth_of(problem, outcome.assignment, objective=objective)


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_compute_is_brute_force_on_both_keys(seed: int) -> None:
    for problem, objective in _problems(seed):
        values = all_values(problem, objective)
        outcome = _run(problem, "compute", objective)
        if not values:
            assert outcome.status == "infeasible"
            continue
        found = _worth(problem, outcome, objective)
        assert (found.time, found.share) == min((v.time, v.share) for v in values)


def _almost_alike(problem: Problem) -> Problem:
    """With the same long time on top of every unit's: what is left of differences is below a solver's rounding."""

    def longer(ticks: UnitTicks) -> UnitTicks:
        return UnitTicks(ticks.embedding + LONG, tuple(t + LONG for t in ticks.layers), ticks.head + LONG)

    devices = (
        replace(device, decode=longer(device.decode), prefill=tuple(map(longer, device.prefill)))
        for device in problem.devices
    )
    return replace(problem, devices=tuple(devices))


@pytest.mark.parametrize("strategy", ["compute", "memory"])
def test_times_that_are_almost_the_same_are_told_apart(strategy: Strategy) -> None:
    for unlike, objective in _problems(25, is_plain=True):
        problem = _almost_alike(unlike)
        values = all_values(problem, objective)
        outcome = _run(problem, strategy, objective)
        if not values:
            assert outcome.status == "infeasible"
            continue
        found = _worth(problem, outcome, objective)
        if strategy == "compute":
            assert (found.time, found.share) == min((v.time, v.share) for v in values)
        else:
            assert (found.share, found.time) == min((v.share, v.time) for v in values)


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_memory_is_brute_force_on_both_keys(seed: int) -> None:
    for problem, objective in _problems(1000 + seed):
        values = all_values(problem, objective)
        outcome = _run(problem, "memory", objective)
        if not values:
            assert outcome.status == "infeasible"
            continue
        found = _worth(problem, outcome, objective)
        assert (found.share, found.time) == min((v.share, v.time) for v in values)


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_mixed_is_brute_force_and_says_what_it_weighed(seed: int) -> None:
    rng = random.Random(seed)
    for problem, objective in _problems(2000 + seed):
        weight = rng.choice([0.0, 0.25, 0.5, 1.0])
        values = all_values(problem, objective)
        outcome = _run(problem, "mixed", objective, weight=weight)
        if not values:
            assert outcome.status == "infeasible"
            continue
        best_time, best_share = min(v.time for v in values), min(v.share for v in values)
        assert (outcome.best_time, outcome.best_share) == (best_time, best_share)
        goal = Goal("mixed", objective, weight=Fraction(weight), best_time=best_time, best_share=best_share)
        found = _worth(problem, outcome, objective)
        assert goal.value(time=found.time, share=found.share) == min(
            goal.value(time=v.time, share=v.share) for v in values
        )


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_uniform_is_the_one_even_split_or_nothing(seed: int) -> None:
    for problem, objective in _problems(3000 + seed, is_plain=True):
        counts = uniform_counts(problem.num_layers, problem.num_devices)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        chain = tuple(StageChoice(i, end - n, end) for i, (n, end) in enumerate(zip(counts, ends, strict=True)))
        outcome = _run(problem, "uniform", objective)
        if not is_allowed(problem, chain):
            assert outcome.status == "infeasible"
            _check_nearest(problem, counts)
        else:
            assert outcome.assignment == chain
            assert outcome.status == "optimal"


def _check_nearest(problem: Problem, counts: tuple[int, ...]) -> None:
    in_order = replace(problem, keep_order=True, use_all=True)
    splits = [tuple(s.end - s.start for s in chain) for chain in all_chains(in_order)]
    distances = [sum(abs(a - b) for a, b in zip(split, counts, strict=True)) for split in splits]
    nearest = nearest_split(problem)
    assert (nearest is None) == (not splits)
    if nearest is not None:
        assert sum(abs(a - b) for a, b in zip(nearest, counts, strict=True)) == min(distances)


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_custom_fills_in_what_the_rules_leave_open(seed: int) -> None:
    for problem, objective in _problems(4000 + seed, has_rules=True):
        values = all_values(problem, objective)
        outcome = _run(problem, "custom", objective)
        if not values:
            assert outcome.status == "infeasible"
            continue
        found = _worth(problem, outcome, objective)
        assert (found.time, found.share) == min((v.time, v.share) for v in values)


def test_a_complete_chain_is_checked_and_costed_but_not_changed() -> None:
    problem = _two_devices(budgets=(40, 40))
    chain = (StageChoice(1, 0, 2), StageChoice(0, 2, 4))
    with SolverSession(is_isolated=False) as session:
        outcome = run_strategy(problem, strategy="custom", objective="latency", session=session, given=chain)
        tight = run_strategy(
            _two_devices(budgets=(40, 13)), strategy="custom", objective="latency", session=session, given=chain
        )
    assert (outcome.status, outcome.assignment, outcome.certified_by) == ("given", chain, None)
    assert outcome.value == 2 * 3 * MILLISECOND + 2 * 2 * MILLISECOND + MILLISECOND
    assert (tight.status, tight.assignment) == ("infeasible", None)


def _two_devices(*, budgets: tuple[int, int]) -> Problem:
    from planner.problem.problem import UnitBytes

    times = [UnitTicks(0, (n * MILLISECOND,) * 4, 0) for n in (2, 3)]
    devices = tuple(ProblemDevice(f"d{i}", b, 0, b, t) for i, (b, t) in enumerate(zip(budgets, times, strict=True)))
    return Problem(devices, UnitBytes(0, (7,) * 4, 0), ((None, MILLISECOND), (MILLISECOND, None)), ((0, 0), (0, 0)))


# --- what must never get worse ---------------------------------------------------------------------------------------


def _best(problem: Problem, strategy: Strategy, objective: Objective) -> Fraction | None:
    return _run(problem, strategy, objective).value


def _plain_problems(seed: int, count: int) -> Iterator[tuple[Problem, Objective, Strategy]]:
    rng = random.Random(seed)
    for _ in range(count):
        strategy: Strategy = rng.choice(["compute", "memory"])
        yield random_problem(rng, max_layers=6, max_devices=4, is_plain=True), rng.choice(OBJECTIVES), strategy


def _is_no_worse(better: Fraction | None, than: Fraction | None) -> bool:
    return than is None or (better is not None and better <= than)


def test_more_memory_is_never_worse() -> None:
    for problem, objective, _ in _plain_problems(1, 25):
        first = problem.devices[0]
        more = replace(first, limit_bytes=first.limit_bytes + 9, budget_bytes=first.budget_bytes + 9)
        grown = replace(problem, devices=(more, *problem.devices[1:]))
        for strategy in ("compute", "memory"):
            assert _is_no_worse(_best(grown, strategy, objective), _best(problem, strategy, objective))


def test_one_more_device_is_never_worse() -> None:
    for problem, objective, strategy in _plain_problems(2, 40):
        if problem.num_devices == 1:
            continue
        rest = tuple(range(problem.num_devices - 1))
        smaller = _select(problem, rest)
        assert _is_no_worse(_best(problem, strategy, objective), _best(smaller, strategy, objective))


def test_faster_links_are_never_worse() -> None:
    for problem, objective, strategy in _plain_problems(3, 30):
        hop = tuple(tuple(None if t is None else t // 2 for t in row) for row in problem.decode_hop)
        prefill = tuple(tuple(tuple(None if t is None else t // 2 for t in r) for r in m) for m in problem.prefill_hop)
        faster = replace(problem, decode_hop=hop, prefill_hop=prefill)
        assert _is_no_worse(_best(faster, strategy, objective), _best(problem, strategy, objective))


def test_smaller_layers_are_never_worse() -> None:
    for problem, objective, strategy in _plain_problems(4, 30):
        units = replace(problem.units, layers=tuple(size - 1 for size in problem.units.layers))
        assert _is_no_worse(
            _best(replace(problem, units=units), strategy, objective), _best(problem, strategy, objective)
        )


def test_relabelled_devices_have_the_same_objective() -> None:
    rng = random.Random(0)
    for problem, objective, strategy in _plain_problems(5, 30):
        order = list(range(problem.num_devices))
        rng.shuffle(order)
        assert _best(_select(problem, tuple(order)), strategy, objective) == _best(problem, strategy, objective)


def test_scaled_times_scale_a_time_objective() -> None:
    for problem, objective, _ in _plain_problems(6, 25):
        scaled = _scaled(problem, 7)
        best, seven = _best(problem, "compute", objective), _best(scaled, "compute", objective)
        assert seven == (None if best is None else 7 * best)
        assert _best(scaled, "memory", objective) == _best(problem, "memory", objective)


def _select(problem: Problem, order: tuple[int, ...]) -> Problem:
    from planner.answers.settle import reordered

    return replace(reordered(problem, order), keep_order=problem.keep_order)


def _scaled(problem: Problem, factor: int) -> Problem:
    def units(times: UnitTicks) -> UnitTicks:
        return UnitTicks(times.embedding * factor, tuple(t * factor for t in times.layers), times.head * factor)

    def matrix(rows: tuple[tuple[int | None, ...], ...]) -> tuple[tuple[int | None, ...], ...]:
        return tuple(tuple(None if t is None else t * factor for t in row) for row in rows)

    devices = tuple(
        replace(d, decode=units(d.decode), prefill=tuple(units(p) for p in d.prefill)) for d in problem.devices
    )
    return replace(
        problem,
        devices=devices,
        decode_hop=matrix(problem.decode_hop),
        return_hop=matrix(problem.return_hop),
        prefill_hop=tuple(matrix(m) for m in problem.prefill_hop),
    )
