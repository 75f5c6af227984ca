"""What `solve` promises before anyone measured and after, beside what `llamarun bench` then takes.

Two shapes. Each is planned for with nothing but the look at this machine, run once, measured (`devices --measure`,
which is remembered), planned for again, and run twice more. Everything is a command as a person types it, with a cache
folder of its own. A run in which other programs took more than a tenth of a core is marked with *.

Run: python -m benchmarks truth      about seven minutes on two cores; SHAPES="135M" chooses
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import SHAPES, make_checkpoint
from planner.measure.calm import MOST_OTHER_CORES, CalmMeter

SIZES = ("--prompt-tokens", "112", "-n", "16", "-c", "128")
RUNS_BEFORE, RUNS_AFTER = 1, 2
WHAT = ("decode", "prefill", "memory")
GOALS = {"look": (0.25, None, None), "measured": (0.05, 0.10, 0.03)}


def main() -> None:
    """Print both predictions beside every run, and the medians of the absolute errors."""
    found: dict[str, list[tuple[float, ...]]] = {"look": [], "measured": []}
    print("shape    plan by     decode ms/token             prefill s                   memory MiB")
    with tempfile.TemporaryDirectory(prefix="bench-truth-") as temp:
        environment = os.environ | {"XDG_CACHE_HOME": str(Path(temp) / "cache"), "LLAMAPLAN_PROBE": "1"}
        for name in os.environ.get("SHAPES", "135M 1.1B").split():
            model = make_checkpoint(SHAPES[name], Path(temp), dtype="bfloat16")
            plans, runs = _one_shape(model, environment)
            for origin, plan in plans.items():
                for run, is_calm in runs:
                    errors = tuple(a / b - 1 for a, b in zip(plan, run, strict=True))
                    found[origin].append(errors)
                    print(f"{name:8} {origin:9} {_line(plan, run)}{'' if is_calm else ' *'}", flush=True)
    for origin, goals in GOALS.items():
        for number, (what, goal) in enumerate(zip(WHAT, goals, strict=True)):
            errors = [abs(error[number]) for error in found[origin]]
            text = "" if goal is None else f" (goal {goal:.0%})"
            print(f"{origin:9} {what:8} median error {median(errors):.1%}, largest {max(errors):.1%}{text}")


Numbers = tuple[float, float, float]
"""Seconds per token, seconds to the first token, bytes."""


def _one_shape(model: Path, environment: dict[str, str]) -> tuple[dict[str, Numbers], list[tuple[Numbers, bool]]]:
    _bench(model, environment)  # compiles the kernels and chooses the path, once per machine
    plans = {"look": _plan(model, environment)}
    runs = [_bench(model, environment) for _ in range(RUNS_BEFORE)]
    started = time.monotonic()
    _run("planner.cli", "devices", model, "--measure", "-q", environment=environment)
    print(f"{model.name}: measured in {time.monotonic() - started:.0f} s")
    plans["measured"] = _plan(model, environment)
    runs += [_bench(model, environment) for _ in range(RUNS_AFTER)]
    return plans, runs


def _plan(model: Path, environment: dict[str, str]) -> Numbers:
    planned = json.loads(_run("planner.cli", "solve", model, *SIZES, "--json", environment=environment))
    print("; ".join(planned.get("origins", ["nothing is known of this machine"])))
    predicted, (stage,) = planned["prediction"], planned["stages"]
    parts = ("weight_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
    used = sum(stage[key] for key in parts)
    return predicted["seconds_per_token"], predicted["time_to_first_token_seconds"], used


def _bench(model: Path, environment: dict[str, str]) -> tuple[Numbers, bool]:
    meter = CalmMeter()
    ran: dict[str, Any] = json.loads(
        _run("runtime.cli", "bench", model, *SIZES[:4], "--repeats", 2, "--json", "-q", environment=environment)
    )
    is_calm = meter.other_cores() <= MOST_OTHER_CORES
    keys = ("median_seconds_per_token", "time_to_first_token_seconds", "peak_memory_bytes")
    decode, prefill, memory = (float(ran[key]) for key in keys)
    return (decode, prefill, memory), is_calm


def _line(plan: Numbers, run: Numbers) -> str:
    scales, digits = (1e3, 1.0, 2**-20), (2, 3, 0)
    return "   ".join(
        f"{scale * a:9.{n}f} {scale * b:9.{n}f} {a / b - 1:+6.1%}"
        for a, b, scale, n in zip(plan, run, scales, digits, strict=True)
    )


def _run(module: str, *arguments: object, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
