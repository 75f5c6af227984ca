"""Seconds of the solver on four sizes that the planner promises, with who proved the answer.

Run: python -m benchmarks solve
"""

import random
import statistics
import time
from dataclasses import replace

from planner.problem import Problem, ProblemDevice, UnitBytes, UnitTicks
from planner.solver_process import SolverSession
from planner.strategies import Outcome, run_strategy
from plans.plan import Strategy

ROUNDS = 3
MILLISECOND = 10**9
STRATEGIES: tuple[Strategy, ...] = ("compute", "memory", "mixed")


def main() -> None:
    """Print one line per case and strategy: the median, the solver in this process and in its own."""
    cases = {
        "126 layers x 32 devices, fixed order": (fixed_order(), 0.5),
        "80 layers x 12 unlike devices, free order": (unlike(12, 80, seed=2), 3.0),
        "80 layers x 24 devices of 3 kinds (golden)": (golden(), 10.0),
        "126 layers x 64 devices of 4 kinds": (unlike(64, 126, seed=1, kinds=4, room=2.5), 60.0),
    }
    print(f"seconds, median of {ROUNDS}; the target is for the strategy compute with the solver in this process")
    for name, (problem, target) in cases.items():
        print(f"{name}: target {target:g} s")
        for strategy in STRATEGIES:
            here, outcome = _timed(problem, strategy, is_isolated=False)
            apart, _ = _timed(problem, strategy, is_isolated=True)
            by = f"{outcome.solver} and {outcome.certified_by}" if outcome.certified_by else outcome.solver
            print(f"  {strategy:8} {here:7.2f} in this process {apart:7.2f} in its own  {outcome.status} by {by}")


def _timed(problem: Problem, strategy: Strategy, *, is_isolated: bool) -> tuple[float, Outcome]:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with SolverSession(time_limit=60, is_isolated=is_isolated) as session:
            # a copy, since a problem remembers what was derived from it
            outcome = run_strategy(replace(problem), strategy=strategy, objective="latency", session=session)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), outcome


def golden() -> Problem:
    """The mixed cluster with a known optimum of 296.262144 ms; see tests/planner/test_golden.py."""
    kinds = (("A100", 4, 12, 1.4), ("L4", 8, 7, 6.9), ("T4", 12, 4, 7.1))
    devices = tuple(
        ProblemDevice(f"{kind}-{i}", most, 0, most, UnitTicks(0, (round(ms * MILLISECOND),) * 80, 0))
        for kind, count, most, ms in kinds
        for i in range(count)
    )
    size = range(len(devices))
    hop = tuple(tuple(None if a == b else 1_032_768_000 for b in size) for a in size)
    return Problem(devices, UnitBytes(0, (1,) * 80, 0), hop, tuple((0,) * len(devices) for _ in size))


def fixed_order() -> Problem:
    """Unlike devices in the order given, any of which may be left out."""
    return replace(unlike(32, 126, seed=1), keep_order=True)


def unlike(num_devices: int, num_layers: int, *, seed: int, kinds: int | None = None, room: float = 1.3) -> Problem:
    """Devices whose memory, speed and links differ; all together hold `room` times the model."""
    rng = random.Random(seed)
    protos = []
    for _ in range(kinds or num_devices):
        most = max(1, round(num_layers / num_devices * room * rng.uniform(0.4, 1.6)))
        budget = most * 1000 + 300 + rng.randrange(1000)
        per_layer = round(rng.uniform(0.5, 8) * MILLISECOND)
        embedding = round(rng.uniform(0, 0.1) * MILLISECOND)
        protos.append((budget, UnitTicks(embedding, (per_layer,) * num_layers, per_layer)))
    devices = tuple(
        ProblemDevice(f"d{i}", budget, 100, budget, times)
        for i in range(num_devices)
        for budget, times in [protos[i % len(protos)]]
    )
    links = {(a, b): round(rng.uniform(0.05, 2) * MILLISECOND) for a in range(len(protos)) for b in range(len(protos))}
    size = range(num_devices)
    hop = tuple(tuple(None if a == b else links[a % len(protos), b % len(protos)] for b in size) for a in size)
    back = tuple(tuple(0 if t is None else MILLISECOND // 10 + t // 10 for t in row) for row in hop)
    return Problem(devices, UnitBytes(700, (1000,) * num_layers, 800, 0, 50, 80, 60), hop, back)


if __name__ == "__main__":
    main()
