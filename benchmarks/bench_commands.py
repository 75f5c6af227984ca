"""Seconds of analyze, solve and export as whole commands, beside Python's own start.

Run: python -m benchmarks commands
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import SHAPES, interleave, make_checkpoint, timed

ROUNDS = 5


def main() -> None:
    """Print the seconds of each command and the ratio to an empty Python."""
    print(f"whole commands on a 100M bf16 checkpoint, median of {ROUNDS}")
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = make_checkpoint(SHAPES["100M"], folder, dtype="bfloat16")
        plan, shards = folder / "plan.json", folder / "shards"
        devices = ["--device", "cpu=1GiB"] * 3
        _run("planner.cli", "solve", model, "--strategy", "uniform", *devices, "-c", "512", "-o", plan)
        variants = {
            "python -c pass": timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)),
            "analyze": timed(lambda: _run("planner.cli", "analyze", model)),
            "solve": timed(lambda: _run("planner.cli", "solve", model, *devices, "-c", "512")),
            "export": timed(lambda: _export(plan, model, shards)),
        }
        results = interleave(variants, rounds=ROUNDS)
    base = results["python -c pass"]
    for name, seconds in results.items():
        print(f"  {name:15} {seconds:6.3f} s  x{seconds / base:.1f}")


def _export(plan: Path, model: Path, shards: Path) -> None:
    shutil.rmtree(shards, ignore_errors=True)
    _run("planner.cli", "export", plan, "--model", model, "-o", shards)


def _run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
