"""A mixed cluster with a known optimum: 24 devices of three kinds, 80 identical layers.

Figures of the Helix system (ASPLOS 2025 artifact): decode milliseconds per layer of Llama 2 70B at batch 2 and the
largest number of layers each device holds; a hop of 32,768 bytes at 1e9 B/s + 1 ms. Embedding, head and the way back
of the token ids cost nothing here.
"""

import pytest

from planner.answers.strategies import run_strategy
from planner.problem.goal import Goal
from planner.problem.problem import Problem, ProblemDevice, UnitBytes, UnitTicks
from planner.program.session import SolverSession
from planner.program.solve import solve_ilp
from planner.proof.certificate import certify
from tests.planner.worth import is_allowed

MILLISECOND = 10**9
KINDS = {"A100": (4, 12, 1.4), "L4": (8, 7, 6.9), "T4": (12, 4, 7.1)}
"""Name: devices, layers each holds, decode milliseconds per layer."""
NUM_LAYERS = 80
HOP_TICKS = 1_032_768_000
OPTIMUM_TICKS = 296_262_144_000
OPTIMUM_LAYERS = {"A100": [12, 12, 12, 12], "L4": [7, 7, 7, 7, 4]}


@pytest.fixture(scope="module")
def golden() -> Problem:
    devices = tuple(
        ProblemDevice(f"{kind}-{i}", layers, 0, layers, UnitTicks(0, (round(time * MILLISECOND),) * NUM_LAYERS, 0))
        for kind, (count, layers, time) in KINDS.items()
        for i in range(count)
    )
    size = range(len(devices))
    hop = tuple(tuple(None if a == b else HOP_TICKS for b in size) for a in size)
    back = tuple((0,) * len(devices) for _ in size)
    return Problem(devices, UnitBytes(0, (1,) * NUM_LAYERS, 0), hop, back)


def test_program_and_certificate_both_prove_the_known_optimum(golden: Problem) -> None:
    goal = Goal("time", "latency")
    answer, certificate = solve_ilp(golden, goal, solvers=("highs",)), certify(golden, goal)
    assert certificate is not None
    assert (answer.status, answer.value) == ("optimal", OPTIMUM_TICKS)
    assert (certificate.method, certificate.value) == ("Held-Karp over device groups", OPTIMUM_TICKS)


def test_compute_finds_the_known_layers(golden: Problem) -> None:
    with SolverSession(("highs",), is_isolated=False) as session:
        outcome = run_strategy(golden, strategy="compute", objective="latency", session=session)
    assert outcome.assignment is not None
    assert is_allowed(golden, outcome.assignment)
    assert (outcome.status, outcome.value) == ("optimal", OPTIMUM_TICKS)
    layers: dict[str, list[int]] = {}
    for stage in outcome.assignment:
        layers.setdefault(golden.devices[stage.device].name.split("-")[0], []).append(stage.end - stage.start)
    assert layers == OPTIMUM_LAYERS


def test_all_devices_at_once_balance_to_the_known_share(golden: Problem) -> None:
    with SolverSession(("highs",), is_isolated=False) as session:
        outcome = run_strategy(golden, strategy="memory", objective="latency", session=session)
    # 4 x 7/12 and 8 x 4/7 leave room for 20 more layers on the 12 T4, two each: the largest share is 4/7
    assert outcome.value is not None
    assert outcome.value.as_integer_ratio() == (4, 7)
    assert outcome.status == "optimal"
