"""Random small partition problems, and the brute force that judges everybody else.

Small enough to list every chain: all orders of all subsets of the devices, all cuts. Made to be nasty: tight memory,
ties, missing links, interchangeable devices, zero times, tied tables, layers that differ.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations_with_replacement, permutations

from planner.problem.goal import Goal
from planner.problem.problem import (
    Assignment,
    Bus,
    Matrix,
    Problem,
    ProblemDevice,
    Rule,
    StageChoice,
    UnitBytes,
    UnitTicks,
)
from plans.plan import Objective
from tests.planner.worth import Worth, is_allowed, worth_of

MILLISECOND = 10**9
"""Ticks of a picosecond."""


def random_problem(
    rng: random.Random,
    *,
    max_layers: int = 6,
    max_devices: int = 4,
    has_rules: bool = False,
    is_plain: bool = False,
    has_buses: bool = False,
) -> Problem:
    """Return a problem; `is_plain` leaves out fixed orders, demanded devices and limits on their number.

    With `has_buses` some devices may share a memory bus, and what was certain is so no longer: the certificate proves
    all of them only where layers are alike and the order is free.
    """
    num_layers, num_devices = rng.randint(1, max_layers), rng.randint(1, max_devices)
    is_unlike = rng.random() < 0.5
    units = _units(rng, num_layers, is_unlike=is_unlike)
    num_chunks = rng.choice([0, 1, 2])
    total = units.embedding + sum(units.layers) + units.head
    kinds = [_device(rng, total, num_layers, num_chunks, is_unlike) for _ in range(rng.randint(1, num_devices))]
    chosen = [rng.randrange(len(kinds)) for _ in range(num_devices)]
    devices = tuple(_named(kinds[kind], i, rng, num_layers, has_rules) for i, kind in enumerate(chosen))
    missing = rng.choice([0.0, 0.0, 0.2])
    style = rng.choice(["uniform", "by kind", "random"])
    problem = Problem(
        devices=devices,
        units=units,
        decode_hop=_matrix(rng, chosen, style, 40, missing=missing, has_diagonal=False),
        return_hop=_matrix(rng, chosen, style, 10, missing=missing / 2, has_diagonal=True),
        prefill_hop=tuple(_matrix(rng, chosen, style, 60, missing=0.0, has_diagonal=False) for _ in range(num_chunks)),
        new_tokens=rng.choice([0, 1, 5]),
        requests_in_flight=rng.choice([1, 2, 3, 8]),
        keep_order=not is_plain and rng.random() < 0.3,
        use_all=not is_plain and rng.random() < 0.15,
        max_stages=None if is_plain else rng.choice([None, None, None, 2]),
    )
    return replace(problem, buses=_buses(rng, problem, is_unlike=is_unlike)) if has_buses else problem


def _buses(rng: random.Random, problem: Problem, *, is_unlike: bool) -> tuple[Bus, ...]:
    """One or two buses, each with some of the devices; units take about as long on them as on the devices."""
    homes = [rng.choice([None, 0, 0, 1]) for _ in problem.devices]
    groups = [frozenset(d for d, home in enumerate(homes) if home == bus) for bus in (0, 1)]
    times = [_times(rng, problem.num_layers, is_unlike=is_unlike) for _ in groups]
    return tuple(Bus(devices, units) for devices, units in zip(groups, times, strict=True) if len(devices) > 1)


def _units(rng: random.Random, num_layers: int, *, is_unlike: bool) -> UnitBytes:
    layers = [rng.choice([7, 11, 13]) for _ in range(num_layers)] if is_unlike else [rng.randint(5, 20)] * num_layers
    embedding, head = rng.randint(0, 15), rng.randint(0, 15)
    shared = embedding if head >= embedding and rng.random() < 0.3 else 0
    return UnitBytes(embedding, tuple(layers), head, shared, rng.randint(0, 6), rng.randint(0, 6), rng.randint(0, 9))


def _times(rng: random.Random, num_layers: int, *, is_unlike: bool) -> UnitTicks:
    if rng.random() < 0.1:
        layers = [0] * num_layers
    elif is_unlike:
        layers = [rng.choice([1, 2, 4]) * MILLISECOND for _ in range(num_layers)]
    else:
        layers = [rng.randint(1, 50) * MILLISECOND // 10] * num_layers
    return UnitTicks(rng.randint(0, 30) * MILLISECOND // 10, tuple(layers), rng.randint(0, 60) * MILLISECOND // 10)


def _device(rng: random.Random, total: int, num_layers: int, num_chunks: int, is_unlike: bool) -> ProblemDevice:
    budget = max(1, int(total * rng.choice([0.2, 0.4, 0.6, 1.0, 1.5]) * rng.uniform(0.7, 1.3))) + 5
    decode = _times(rng, num_layers, is_unlike=is_unlike)
    prefill = tuple(_times(rng, num_layers, is_unlike=is_unlike) for _ in range(num_chunks))
    return ProblemDevice("kind", budget, rng.randint(0, 5), budget, decode, prefill)


def _named(kind: ProblemDevice, number: int, rng: random.Random, num_layers: int, has_rules: bool) -> ProblemDevice:
    rule = random_rule(rng, num_layers) if has_rules and rng.random() < 0.4 else Rule()
    return ProblemDevice(
        f"d{number}", kind.budget_bytes, kind.overhead_bytes, kind.limit_bytes, kind.decode, kind.prefill, rule
    )


def random_rule(rng: random.Random, num_layers: int) -> Rule:
    """Return one demand on a device: banned, pinned layers, banned layers, a number of layers, or an end."""
    first = rng.randrange(num_layers)
    last = rng.randint(first + 1, num_layers)
    count = rng.randint(0, num_layers)
    return rng.choice(
        [
            Rule(is_banned=True),
            Rule(is_required=True),
            Rule(is_required=True, max_start=first, min_end=last),
            Rule(banned=frozenset(range(first, last))),
            Rule(is_required=True, min_layers=count, max_layers=count),
            Rule(max_layers=count),
            Rule(is_required=True, embedding=True),
            Rule(is_required=True, head=True),
            Rule(embedding=False, head=False),
        ]
    )


def _matrix(
    rng: random.Random, kinds: list[int], style: str, most: int, *, missing: float, has_diagonal: bool
) -> Matrix:
    known: dict[object, int | None] = {}

    def cell(a: int, b: int) -> int | None:
        if a == b:
            return 0 if has_diagonal else None
        key = {"uniform": 0, "by kind": (kinds[a], kinds[b]), "random": (a, b)}[style]
        if key not in known:
            known[key] = None if rng.random() < missing else rng.randint(0, most) * MILLISECOND // 10
        return known[key]

    return tuple(tuple(cell(a, b) for b in range(len(kinds))) for a in range(len(kinds)))


def all_chains(problem: Problem) -> Iterator[Assignment]:
    """Yield every valid chain."""
    for num_stages in range(1, problem.num_devices + 1):
        for devices in permutations(range(problem.num_devices), num_stages):
            for inner in combinations_with_replacement(range(problem.num_layers + 1), num_stages - 1):
                cuts = (0, *inner, problem.num_layers)
                chain = tuple(StageChoice(d, cuts[i], cuts[i + 1]) for i, d in enumerate(devices))
                if is_allowed(problem, chain):
                    yield chain


def all_values(problem: Problem, objective: Objective) -> list[Worth]:
    """Return what every valid chain is worth."""
    return [worth_of(problem, chain, objective=objective) for chain in all_chains(problem)]


def brute_force(values: list[Worth], goal: Goal) -> Fraction | None:
    """Return the least value of a goal; None if there is no chain."""
    allowed = [v for v in values if goal.max_time is None or v.time <= goal.max_time]
    return min((goal.value(time=v.time, share=v.share) for v in allowed), default=None)
