"""Prediction against reality: `devices --measure`, then what `solve` predicts beside what `llamarun bench` measures.

Shapes x dtypes x cuts x contexts, every command a process of its own as a person would type it. Of int8 and int4 the
devices are measured, and plans made, with --weights, and an export of each plan is run. A run during which other
programs took more than a tenth of a core is repeated, at most three times, and marked with * if none was calm.

Run: python -m benchmarks prediction      most of an hour on two cores; MODELS="55M:bfloat16 135M:int4 ..." chooses
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import SHAPES, make_checkpoint
from planner.measure.calm import MOST_OTHER_CORES, CalmMeter

MODELS = (
    *("55M:bfloat16", "100M:float32", "135M:bfloat16", "360M:float32", "1.1B:bfloat16"),
    *("135M:int8", "135M:int4", "1.1B:int8", "1.1B:int4"),
)
PACKED = ("int8", "int4")
CASES = ((1, 112), (2, 496), (3, 1008), (4, 2032))
"""(stages, prompt tokens): with the new tokens, contexts of 128 to 2048."""
NEW_TOKENS = 16
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted and measured of one run; seconds and bytes."""

    decode: tuple[float, float]
    prefill: tuple[float, float]
    memory: tuple[float, float]
    is_calm: bool

    def errors(self) -> tuple[float, float, float]:
        """Return (predicted / measured - 1) of each pair."""
        return tuple(a / b - 1 for a, b in (self.decode, self.prefill, self.memory))  # type: ignore[return-value]


def main() -> None:
    """Print the table and the medians of the absolute errors."""
    found: list[Comparison] = []
    print("shape    dtype     stages context   decode ms/token       prefill s          memory MiB")
    print("                                    predicted measured    predicted measured    predicted measured")
    with tempfile.TemporaryDirectory(prefix="bench-prediction-") as temp:
        for name in os.environ.get("MODELS", "").split() or MODELS:
            shape, dtype = name.split(":")
            weights = dtype if dtype in PACKED else None
            model = _checkpoint(shape, Path(temp), dtype="bfloat16" if weights is not None else dtype)
            for stages, prompt, comparison in _compare(model, Path(temp), weights):
                found.append(comparison)
                print(f"{shape:8} {dtype:9} {_line(stages, prompt, comparison)}", flush=True)
    for number, what in enumerate(("decode", "prefill", "memory")):
        errors = [abs(comparison.errors()[number]) for comparison in found]
        print(f"{what}: median error {median(errors):.1%}, largest {max(errors):.1%}")


def _checkpoint(shape: str, folder: Path, *, dtype: str) -> Path:
    """Return a random checkpoint, made if it is not there."""
    target = folder / f"{shape}-{dtype}"
    return target if target.is_dir() else make_checkpoint(SHAPES[shape], folder, dtype=dtype)


def _compare(model: Path, folder: Path, weights: str | None) -> Iterator[tuple[int, int, Comparison]]:
    cluster, plan, shards = folder / "cluster.json", folder / "plan.json", folder / "shards"
    devices = ["--device", "cpu=4GiB"] * max(stages for stages, _prompt in CASES)
    packed = ["--weights", weights] if weights is not None else []
    _calm("planner.cli", "devices", "--measure", model, *packed, *devices, "-o", cluster, "-q")
    for stages, prompt in CASES:
        cut = _cut(_num_layers(model), stages)
        sizes = ["--prompt-tokens", prompt, "-n", NEW_TOKENS]
        options = ["--cluster", cluster, *packed, "--layers", cut, *sizes, "-c", prompt + NEW_TOKENS, "-o", plan]
        planned = json.loads(_run("planner.cli", "solve", model, *options, "--json"))
        target: list[object] = [plan, "--model", model]
        if packed:
            shutil.rmtree(shards, ignore_errors=True)
            _run("planner.cli", "export", plan, "--model", model, "-o", shards, "-q")
            target = [shards]
        ran, is_calm = _calm("runtime.cli", "bench", *target, *sizes, "--repeats", 2, "--json", "-q")
        mapped_bytes = sum(file.stat().st_size for file in (shards if packed else model).glob("*.safetensors"))
        yield stages, prompt, _comparison(planned, json.loads(ran), mapped_bytes=mapped_bytes, is_calm=is_calm)


def _comparison(planned: dict[str, Any], ran: dict[str, Any], *, mapped_bytes: int, is_calm: bool) -> Comparison:
    """Compare; the plan's devices are one process here, so what they would each have is there once.

    A tied table of two stages is one mapping, and stages take turns, so only one of them needs its workspace.
    """
    predicted, stages = planned["prediction"], planned["stages"]
    memory = min(sum(stage["weight_bytes"] for stage in stages), mapped_bytes)
    memory += sum(stage["kv_cache_bytes"] + stage["overhead_bytes"] for stage in stages)
    memory += max(stage["activation_bytes"] for stage in stages)
    return Comparison(
        decode=(predicted["seconds_per_token"], ran["median_seconds_per_token"]),
        prefill=(predicted["time_to_first_token_seconds"], ran["time_to_first_token_seconds"]),
        memory=(memory, ran["peak_memory_bytes"]),
        is_calm=is_calm,
    )


def _line(stages: int, prompt: int, comparison: Comparison) -> str:
    decode, prefill, memory = (f"{error:+6.1%}" for error in comparison.errors())
    numbers = (
        f"{1000 * comparison.decode[0]:8.2f} {1000 * comparison.decode[1]:8.2f} {decode}",
        f"{comparison.prefill[0]:7.3f} {comparison.prefill[1]:7.3f} {prefill}",
        f"{comparison.memory[0] / 2**20:6.0f} {comparison.memory[1] / 2**20:6.0f} {memory}",
    )
    return f"{stages:6} {prompt + NEW_TOKENS:7}   {'   '.join(numbers)}{'' if comparison.is_calm else ' *'}"


def _num_layers(model: Path) -> int:
    count: int = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return count


def _cut(num_layers: int, stages: int) -> str:
    ends = [num_layers * part // stages for part in range(stages + 1)]
    return ",".join(f"{start}-{end}@cpu#{index}" for index, (start, end) in enumerate(pairwise(ends)))


def _calm(module: str, *arguments: object) -> tuple[str, bool]:
    for _ in range(ATTEMPTS):
        meter = CalmMeter()
        output = _run(module, *arguments)
        is_calm = meter.other_cores() <= MOST_OTHER_CORES
        if is_calm:
            break
    return output, is_calm


def _run(module: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
