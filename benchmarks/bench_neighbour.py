"""What a program that keeps one core busy costs decoding: its fair share, or a multiple of it (row P15)?

Both kinds of run in turns, on all cores; the neighbour is a loop that is pinned to one of them.

Run: python -m benchmarks neighbour      about two minutes
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.measure import SHAPES, make_checkpoint

ROUNDS = 4
COMMAND = (sys.executable, "-P", "-m", "runtime.cli", "bench")
OPTIONS = ("--prompt-tokens", "16", "-n", "32", "--speed", "max", "--json", "-q")


def main() -> None:
    """Print tokens per second of every round, and how many times longer a token takes beside the neighbour."""
    cores = sorted(os.sched_getaffinity(0))
    quiet: list[float] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-neighbour-") as temp:
        model = make_checkpoint(SHAPES["135M"], Path(temp), dtype="bfloat16")
        _tokens_per_second(model)  # compiles the kernels
        for _ in range(ROUNDS):
            quiet.append(_tokens_per_second(model))
            with _neighbour(cores[-1]):
                beside.append(_tokens_per_second(model))
            print(f"alone {quiet[-1]:6.1f} tokens/s   beside a loop on one core {beside[-1]:6.1f}", flush=True)
    fair = len(cores) / (len(cores) - 0.5)
    longer = median(quiet) / median(beside)
    print(f"a token takes {longer:.2f} x as long; with half of one core gone, {fair:.2f} x is fair")


@contextmanager
def _neighbour(core: int) -> Iterator[None]:
    loop = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as process:
        try:
            yield
        finally:
            process.kill()


def _tokens_per_second(model: Path) -> float:
    done = subprocess.run([*COMMAND, str(model), *OPTIONS], check=True, capture_output=True)
    return float(1 / json.loads(done.stdout)["median_seconds_per_token"])


if __name__ == "__main__":
    main()
