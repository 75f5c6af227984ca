"""Serving: `llamarun serve`, llama-server and vLLM's server for CPUs under 1, 4 and 16 users, one after the other.

In every round each server is started, warmed up, measured and ended. Users ask at the same time for 64 tokens after 128
random ones of their own, streamed; then one of them is being answered while 16 others arrive. `llamarun bench` runs the
same sequences without HTTP in the same round, at batch 1 and at as many as there are users at most. Speeds are medians
over the rounds, ratios medians of the rounds' ratios. With --results rounds may be run one at a time.

Run: python -m benchmarks.bench_serve --model CHECKPOINT --gguf FILE --llama-server PATH --vllm PATH/bin/vllm
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import PROMPT_IDS, SHIPPED
from benchmarks.servers import LLAMARUN, Peer, Served, llama_server, llamarun, running, vllm
from benchmarks.stream_client import Stream, longest_gap, wave

CONTEXT_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 64
RUNNING_TOKENS = 256
WAVES = {1: 4, 4: 2}
"""By users, else one or as often as --waves says."""

Round = dict[str, dict[str, float]]
"""Server -> name of what was measured -> value."""


def main(arguments: Sequence[str] = ()) -> None:
    """Measure and print the table."""
    options = _options(arguments)
    rounds = [json.loads(line) for line in _lines(options.results)]
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as temp:
        for number in range(options.rounds):
            rounds.append(_round(options, log=Path(temp) / "log", is_turned=bool((len(rounds) + number) % 2)))
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps(rounds[-1]) + "\n")
    for line in _table(rounds, options.users):
        print(line, flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=SHIPPED, help="a checkpoint, or an export in fewer bits")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama-server")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's program")
    parser.add_argument("--vllm", type=Path, help="vLLM's program, in an environment of its own")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="append every round here, and print all that lie here")
    return parser.parse_args(arguments)


def _lines(file: Path | None) -> list[str]:
    return file.read_text().splitlines() if file is not None and file.is_file() else []


def _round(options: argparse.Namespace, *, log: Path, is_turned: bool) -> Round:
    most = max(options.users)
    measurements: dict[str, Callable[[], dict[str, float]]] = {
        peer.name: lambda peer=peer: _measure(peer, options.users, log) for peer in _peers(options, slots=most + 1)
    }
    measurements["llamarun bench"] = lambda: _bench(options.model, sorted({1, most}))
    names = list(measurements)[:: -1 if is_turned else 1]
    return {name: measurements[name]() for name in names}


def _peers(options: argparse.Namespace, *, slots: int) -> Iterator[Peer]:
    yield llamarun(options.model, "--slots", slots, "--ctx-size", CONTEXT_TOKENS, "--quiet")
    if options.llama_server is not None:
        yield llama_server(options.gguf, slots=slots, context_tokens=CONTEXT_TOKENS, program=options.llama_server)
    if options.vllm is not None:
        yield vllm(options.model, slots=slots, context_tokens=CONTEXT_TOKENS, program=options.vllm)


def _measure(peer: Peer, users: Sequence[int], log: Path) -> dict[str, float]:
    print(f"{peer.name} ...", file=sys.stderr, flush=True)
    with running(peer, log=log) as served:
        return asyncio.run(_ask(served, users))


async def _ask(served: Served, users: Sequence[int]) -> dict[str, float]:
    port, model = served.port, served.model
    for count in (1, max(users)):
        await wave(port, _prompts(count), model=model, new_tokens=8)
    found: dict[str, float] = {}
    for count in users:
        waves = [
            await wave(port, _prompts(count), model=model, new_tokens=NEW_TOKENS) for _ in range(WAVES.get(count, 1))
        ]
        found |= {f"{name} {count}": value for name, value in _figures(waves).items()}
    found["gap"] = await longest_gap(
        port, _prompts(max(users) + 1), model=model, running_tokens=RUNNING_TOKENS, new_tokens=8
    )
    return found


def _prompts(count: int) -> list[list[int]]:
    return [random.choices(PROMPT_IDS, k=PROMPT_TOKENS) for _ in range(count)]


def _figures(waves: Sequence[Sequence[Stream]]) -> dict[str, float]:
    """Return what counts of waves of as many users."""
    streams = [stream for streams in waves for stream in streams]
    speeds = [
        sum(s.num_new_tokens for s in streams) / (max(s.moments[-1] for s in streams) - min(s.started for s in streams))
        for streams in waves
    ]
    first = [stream.first_token_seconds for stream in streams]
    return {
        "tokens/s": statistics.median(speeds),
        "first": statistics.median(first),
        "slowest first": max(first),
        "decode tokens/s": statistics.median((s.num_new_tokens - 1) / (s.moments[-1] - s.moments[0]) for s in streams),
    }


def _bench(model: Path, batches: Sequence[int]) -> dict[str, float]:
    """Return speeds of the engine without a server, of whole answers and of decoding alone."""
    print("llamarun bench ...", file=sys.stderr, flush=True)
    found: dict[str, float] = {}
    for batch in batches:
        options = ["--batch-size", batch, "--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS, "--repeats", 3]
        words = ["bench", model, *options, "--ctx-size", CONTEXT_TOKENS, "--no-verify", "--json", "--quiet"]
        command = [*LLAMARUN, *map(str, words)]
        document: Any = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        decode = document["tokens_per_second"]
        seconds = document["time_to_first_token_seconds"] + batch * (NEW_TOKENS - 1) / decode
        found |= {f"tokens/s {batch}": batch * NEW_TOKENS / seconds, f"decode tokens/s {batch}": decode / batch}
    return found


def _table(rounds: Sequence[Round], users: Sequence[int]) -> Iterator[str]:
    yield f"{len(rounds)} rounds, prompts of {PROMPT_TOKENS}, {NEW_TOKENS} new tokens"
    yield f"{'':16}" + "".join(f"{f'{count} users':>34}" for count in users) + f"{'longest gap':>14}"
    peers = [name for name in rounds[0] if name != "llamarun bench"]
    for peer in sorted(peers):
        value = partial(_median, rounds, peer)
        cells = [
            f"{value(f'tokens/s {count}'):8.1f} tok/s, first {value(f'first {count}'):5.2f}"
            f" {value(f'slowest first {count}'):5.2f} s"
            for count in users
        ]
        yield f"{peer:16}" + "".join(f"{cell:>34}" for cell in cells) + f"{_median(rounds, peer, 'gap'):12.2f} s"
    for peer in sorted({*peers} - {"llamarun"}):
        ratios = [f"{count} users {_ratio(rounds, peer, f'tokens/s {count}'):.2f}" for count in users]
        yield f"llamarun / {peer}: " + ", ".join(ratios)
    most = max(users)
    yield from (
        f"llamarun serve / bench, {words}: {_ratio(rounds, 'llamarun bench', name):.3f}"
        for words, name in (
            ("decoding of one user", "decode tokens/s 1"),
            (f"whole answers of {most} users", f"tokens/s {most}"),
        )
    )
    slowest = statistics.median(
        found["llamarun"][f"slowest first {most}"] / found["llamarun"][f"first {most}"] for found in rounds
    )
    yield f"llamarun, first tokens of {most} users: the slowest {slowest:.2f} x the median"
    step = statistics.median(1 / found["llamarun"][f"decode tokens/s {most}"] for found in rounds)
    chunk = _median(rounds, "llamarun", "first 1")
    yield f"llamarun, longest gap: two prompts and a step are {2 * chunk + step:.2f} s"


def _median(rounds: Sequence[Round], peer: str, name: str) -> float:
    return statistics.median(found[peer][name] for found in rounds if peer in found)


def _ratio(rounds: Sequence[Mapping[str, Mapping[str, float]]], peer: str, name: str) -> float:
    return statistics.median(found["llamarun"][name] / found[peer][name] for found in rounds if peer in found)


if __name__ == "__main__":
    main(sys.argv[1:])
