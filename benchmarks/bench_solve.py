"""Seconds of the solver on four sizes that the planner promises, with who proved the answer; and analyze of 405B.

Run: python -m benchmarks solve
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from planner.answers.strategies import Outcome, run_strategy
from planner.problem.problem import Problem, ProblemDevice, UnitBytes, UnitTicks
from planner.program.session import SolverSession
from plans.plan import Strategy

ROUNDS = 3
MILLISECOND = 10**9
STRATEGIES: tuple[Strategy, ...] = ("compute", "memory", "mixed")
SEEDS = range(1, 7)
LLAMA_405B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip


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
    _print_seeds()
    _print_analyze()


def _print_seeds() -> None:
    """Other random devices of the same sizes: one lucky instance would prove little."""
    sizes = {
        "126 layers x 32 devices, fixed order": lambda seed: replace(unlike(32, 126, seed=seed), keep_order=True),
        "80 layers x 12 unlike devices, free order": lambda seed: unlike(12, 80, seed=seed),
        "126 layers x 64 devices of 4 kinds": lambda seed: unlike(64, 126, seed=seed, kinds=4, room=2.5),
    }
    print(f"compute over {len(SEEDS)} random clusters each, once, in this process")
    for name, make in sizes.items():
        runs = [_once(make(seed), "compute", is_isolated=False) for seed in SEEDS]
        times = [seconds for seconds, _outcome in runs]
        proved = sum(outcome.status == "optimal" for _seconds, outcome in runs)
        print(f"  {name}: {min(times):.2f} to {max(times):.2f} s, {proved} of {len(runs)} proved")


def _print_analyze() -> None:
    """The whole command on a bare configuration, as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA_405B))
        command = [sys.executable, "-m", "planner.cli", "analyze", str(config)]
        seconds, resident = zip(*(_run(command) for _ in range(5)), strict=True)
    print(f"analyze of 405B: {statistics.median(seconds):.2f} s, {max(resident) / 2**20:.0f} MiB resident")


_LAUNCHER = (
    "import resource, subprocess, sys, time; started = time.perf_counter(); "
    "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
    "print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)
"""A process inherits the peak of who starts it, so a small one does."""


def _run(command: list[str]) -> tuple[float, int]:
    done = subprocess.run([sys.executable, "-c", _LAUNCHER, *command], check=True, capture_output=True, text=True)
    seconds, kibibytes = done.stdout.split()
    return float(seconds), int(kibibytes) * 1024


def _timed(problem: Problem, strategy: Strategy, *, is_isolated: bool) -> tuple[float, Outcome]:
    runs = [_once(problem, strategy, is_isolated=is_isolated) for _ in range(ROUNDS)]
    return statistics.median(seconds for seconds, _outcome in runs), runs[-1][1]


def _once(problem: Problem, strategy: Strategy, *, is_isolated: bool) -> tuple[float, Outcome]:
    started = time.perf_counter()
    with SolverSession(time_limit=60, is_isolated=is_isolated) as session:
        # a copy, since a problem remembers what was derived from it
        outcome = run_strategy(replace(problem), strategy=strategy, objective="latency", session=session)
    return time.perf_counter() - started, outcome


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
