"""`llamaplan simulate --slots` against `llamarun serve`: two processes of one thread each, 4 and 16 users.

The layers are measured with one thread, the planner cuts the model for two equal devices, and the simulator says how
many tokens per second so many slots give when a request follows another one at once. Then as many users ask the real
server for the same number of tokens, in rounds that take turns with the other number of users.

Run: python -m benchmarks slots      (or python -m benchmarks.bench_slots --model FOLDER)
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

from benchmarks.measure import PROMPT_IDS, SHAPES, make_checkpoint
from benchmarks.servers import Served, llamarun, running

PROMPT_TOKENS, NEW_TOKENS, CONTEXT = 128, 64, 256
USERS = (4, 16)
REQUESTS_PER_USER, ROUNDS = 3, 3
GOAL = 0.9


def main(arguments: Sequence[str] = ()) -> None:
    """Print what was promised and what came, for each number of users."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a checkpoint; unset: random weights of 135M parameters")
    parser.add_argument("--cluster", type=Path, help="measured before, and where it is written if it is not there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = options.model or make_checkpoint(SHAPES["135M"], folder, dtype="bfloat16")
        _compare(model, folder, options.cluster or folder / "cluster.json")


def _compare(model: Path, folder: Path, cluster: Path) -> None:
    if not cluster.exists():
        devices = ["--device", "cpu=4GiB", "--device", "cpu=4GiB", "--threads", 1]
        _run("planner.cli", "devices", model, "--measure", *devices, "-o", cluster, "-q")
    plan = folder / "plan.json"
    sizes = ["--prompt-tokens", PROMPT_TOKENS, "--max-tokens", NEW_TOKENS]
    cut = [
        "--execution",
        "process_per_stage",
        "--use-all",
        "--objective",
        "throughput",
        "--requests-in-flight",
        2,
        "-c",
        CONTEXT,
        *sizes,
    ]
    planned = json.loads(_run("planner.cli", "solve", model, "--cluster", cluster, *cut, "-o", plan, "--json"))
    layers = ", ".join(f"{stage['start_layer']}-{stage['end_layer']}" for stage in planned["stages"])
    print(f"{model.name}, layers {layers}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {ROUNDS} rounds", flush=True)
    seen: dict[int, list[float]] = {users: [] for users in USERS}
    for number in range(ROUNDS):
        for users in USERS:
            options = ("--model", model, "--processes", "--slots", users, "--no-reuse")
            with running(llamarun(plan, *options), log=folder / "log") as served:
                asyncio.run(_ask(served, users, each=1, seed=99))  # the first steps of a process are slow
                seen[users].append(asyncio.run(_ask(served, users, each=REQUESTS_PER_USER, seed=number)))
    for users, rates in seen.items():
        told = json.loads(
            _run("planner.cli", "simulate", plan, "--slots", users, "--requests", users * REQUESTS_PER_USER, "--json")
        )
        promised, taken = told["tokens_per_second"], median(rates)
        each = " ".join(f"{rate:.1f}" for rate in rates)
        print(
            f"  {users:2} users: promised {promised:.1f} tokens/s, served {taken:.1f} ({each}): {taken / promised:.2f}"
        )


async def _ask(served: Served, users: int, *, each: int, seed: int) -> float:
    """Return tokens per second of so many users, each of whom asks again as soon as it has its answer."""
    draw = random.Random(seed)
    async with httpx2.AsyncClient(base_url=served.url, timeout=600) as client:

        async def user() -> int:
            return sum([await _one(client, draw) for _ in range(each)])

        started = time.perf_counter()
        counts = await asyncio.gather(*(user() for _ in range(users)))
        return sum(counts) / (time.perf_counter() - started)


async def _one(client: httpx2.AsyncClient, draw: random.Random) -> int:
    """Stream one answer; returns its tokens."""
    ids = draw.choices(PROMPT_IDS, k=PROMPT_TOKENS)
    body = {"prompt": ids, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            count += line.startswith("data: {")
    return count - 1  # the last event says how it ended


def _run(module: str, *arguments: Any) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1:])
