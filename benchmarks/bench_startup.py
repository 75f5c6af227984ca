"""Seconds from the command line to the first token, and peak memory: llamarun's first run, later runs, transformers.

The first run compiles the kernels and measures which path is faster; its cache folder is a new one.

Run: python -m benchmarks.bench_startup --models FOLDER
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import SHAPES, make_checkpoint

ROUNDS = 3
PROMPT_IDS = ",".join(map(str, range(5, 133)))
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = torch.tensor([[int(n) for n in sys.argv[2].split(",")]])
model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
"""


def main(arguments: Sequence[str] = ()) -> None:
    """Print seconds and peak memory for each shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["135M", "1.1B"])
    parser.add_argument("--models", type=Path, help="keep the checkpoints here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temp:
        models = options.models or Path(temp)
        for shape in options.shape:
            folder = models / f"{shape}-bfloat16"
            if not folder.is_dir():
                make_checkpoint(SHAPES[shape], models, dtype="bfloat16")
            _measure(folder, Path(temp) / shape)


def _measure(folder: Path, cache: Path) -> None:
    cache.mkdir()
    first, _ = _llamarun(folder, cache, speed="auto")
    later: dict[str, list[float]] = {"auto": [], "reference": [], "transformers": []}
    peaks: dict[str, int] = {}
    for _ in range(ROUNDS):
        for speed in ("auto", "reference"):
            seconds, peaks[speed] = _llamarun(folder, cache, speed=speed)
            later[speed].append(seconds)
        later["transformers"].append(_run([sys.executable, "-c", TRANSFORMERS, str(folder), PROMPT_IDS])[0])
    medians = {name: statistics.median(seconds) for name, seconds in later.items()}
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder.name}: first run {first:.1f} s; then " + ", ".join(f"{n} {s:.1f} s" for n, s in medians.items()))
    for speed, peak in peaks.items():
        print(f"  peak memory, {speed}: {peak / 2**20:.0f} MiB, weights {weights / 2**20:.0f} MiB", flush=True)


def _llamarun(folder: Path, cache: Path, *, speed: str) -> tuple[float, int]:
    """Run one command; returns its wall seconds and its peak memory in bytes."""
    command = [sys.executable, "-m", "runtime.cli", "generate", str(folder), "--prompt-ids", PROMPT_IDS, "-n", "16"]
    seconds, out = _run([*command, "--ignore-eos", "--temp", "0", "--json", "--speed", speed], cache=cache)
    document = json.loads(out)
    # All tokens but the first, so that the figure is the time to the first one.
    return seconds - (document["new_tokens"] - 1) * document["median_seconds_per_token"], document["peak_memory_bytes"]


def _run(command: list[str], *, cache: Path | None = None) -> tuple[float, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
