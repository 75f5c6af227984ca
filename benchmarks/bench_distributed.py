"""Two processes of one thread each against one process: decode with 1 and 4 requests in flight, batch 4, first token.

1.1B shape, cut where the planner cuts it for two equal devices. In every round each variant makes a few greedy tokens,
in turn, and both cores read the same weights at once: that rate, over the bytes of a token, is the memory bound.
"formula" is what the planner's formula gives for the stage and cycle times measured with one request in flight; the
formula does not know that the two processes share the bound. transformers' own pipeline mode needs processes of its
own and runs after the others.

Run: python -m benchmarks distributed            (everything; on a shared machine rather one dtype and path at a time)
     python -m benchmarks.bench_distributed bf16 reference [decode|first]
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import SHAPES, interleave, interleave_rounds, make_checkpoint

PROMPT_TOKENS = 16
NEW_TOKENS = 12
ROUNDS = 7
IN_FLIGHT = 4
LONG_PROMPT_TOKENS = 512
LONG_ROUNDS = 2
CHUNK_TOKENS = 128
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Sessions:
    """The same export in one process and in two."""

    one: Any
    two: Any
    plan: Any


def main() -> None:
    """Print every table."""
    for dtype, speed, what in itertools.product(DTYPES, ("reference", "max"), ("decode", "first")):
        run(dtype, speed, what)


def run(dtype: str, speed: str, what: str) -> None:
    """Print one table."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temp:
        model = make_checkpoint(SHAPES["1.1B"], Path(temp), dtype=DTYPES[dtype])
        with _open(model, Path(temp) / "shards", speed=speed) as (sessions, threads):
            assert threads == 1
            print(f"\n1.1B {dtype}, {speed} path, 2 processes x 1 thread against 1 process x 1 thread: {what}")
            (_decode if what == "decode" else _first)(sessions)
        if speed == "reference" or what == "first":
            _print_peer(model, what)


def _decode(sessions: Sessions) -> None:
    one, two = sessions.one, sessions.two
    rates: Mapping[str, Callable[[], float]] = {
        "one process, 1 request": lambda: 1 / _step(generate_requests(one, _requests(one, 1))),
        "two processes, 1 in flight": lambda: 1 / _step(generate_requests(two, _requests(two, 1))),
        f"two processes, {IN_FLIGHT} in flight": lambda: IN_FLIGHT / _cycle(two),
        f"one process, batch {IN_FLIGHT}": lambda: IN_FLIGHT / _step(generate_requests(one, _requests(one, IN_FLIGHT))),
        "memory bound of two cores": lambda: _memory_bound(one),
        "planner's formula": lambda: _formula(two),
    }
    rounds = interleave_rounds(rates, rounds=ROUNDS)
    base, alone, flight, batch, bound, formula = rounds.values()
    for name, values in rounds.items():
        print(f"{name:28} {median(values):7.2f} tokens/s   {min(values):.2f} to {max(values):.2f}")
    print("medians of the rounds' ratios:")
    capped = [min(pair) for pair in zip(bound, formula, strict=True)]
    for name, (first, second) in {
        "1 in flight / one process": (alone, base),
        f"{IN_FLIGHT} in flight / 1 in flight": (flight, alone),
        f"{IN_FLIGHT} in flight / memory bound": (flight, bound),
        f"{IN_FLIGHT} in flight / formula": (flight, formula),
        f"{IN_FLIGHT} in flight / formula or bound": (flight, capped),
        f"batch {IN_FLIGHT} / {IN_FLIGHT} in flight": (batch, flight),
    }.items():
        print(f"{name:34} {median(a / b for a, b in zip(first, second, strict=True)):.3f}")


def _first(sessions: Sessions) -> None:
    one, two = sessions.one, sessions.two
    seconds: Mapping[str, Callable[[], float]] = {
        "one process": lambda: _first_token(one, LONG_PROMPT_TOKENS),
        "two processes, whole prompt": lambda: _first_token(two, LONG_PROMPT_TOKENS),
        f"two processes, chunks of {CHUNK_TOKENS}": lambda: _first_token(two, CHUNK_TOKENS),
    }
    found = interleave(seconds, rounds=LONG_ROUNDS, warmup=0)
    whole, chunked = list(found.values())[1:]
    for name, value in found.items():
        print(f"{name:32} {value:7.2f} s to the first token of {LONG_PROMPT_TOKENS}")
    print(f"chunks / whole prompt            {chunked / whole:.3f}")


def _print_peer(model: Path, what: str) -> None:
    sizes = (PROMPT_TOKENS, NEW_TOKENS) if what == "decode" else (LONG_PROMPT_TOKENS, 1)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, "-m", "benchmarks.pipeline_peer", model, *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    name = "transformers, pp_size=2"
    if what == "decode":
        print(f"{name:28} {1 / found['step']:7.2f} tokens/s")
    else:
        print(f"{name:32} {found['first']:7.2f} s to the first token of {LONG_PROMPT_TOKENS}")


def _open(model: Path, output: Path, *, speed: str) -> Any:
    from contextlib import contextmanager

    from exporter import export
    from planner import analyze_model
    from planner.answers.solve import solve
    from planner.api import load_cluster, make_workload
    from planner.problem.question import Question
    from runtime.distributed.control.launch import LocalWorkers
    from runtime.distributed.opening import open_processes
    from runtime.distributed.session import ProcessSettings
    from runtime.prepared import prepare_session
    from runtime.reading.opening import open_source
    from runtime.session import load_session

    @contextmanager
    def opened() -> Any:
        import torch

        profile = analyze_model(model)
        question = Question(
            profile,
            cluster=load_cluster(devices=["cpu=8GiB"] * 2),
            workload=make_workload(profile, requests_in_flight=IN_FLIGHT),
            objective="throughput",
        )
        plan = solve(question)
        print("layers per stage:", *plan.boundaries)
        export(plan, model=model, output=output)
        prepared = prepare_session(open_source(output, model=None), device_map={})
        one = load_session(prepared, speed=speed, verifies=False)
        settings = ProcessSettings(workers=LocalWorkers(output), threads=1, speed=speed)
        with open_processes(prepared, settings, batch_size=IN_FLIGHT, verifies=False) as two:
            yield Sessions(one, two, plan), torch.get_num_threads()

    return opened()


def _requests(
    session: Any, count: int, *, prompt_tokens: int = PROMPT_TOKENS, chunk: int = 2048, new: int = NEW_TOKENS
) -> Any:
    import random

    from runtime.generate.limits import Limits
    from runtime.generate.request import Request
    from runtime.generate.sampling import Sampling

    draw = random.Random(0)
    limits = Limits(context_tokens=2048, max_tokens=new, prefill_chunk_tokens=chunk)
    vocab_size = session.prepared.vocab_size
    return [
        Request(
            prompt_ids=[draw.randrange(vocab_size) for _ in range(prompt_tokens)],
            sampling=Sampling(),
            limits=limits,
            sequence_index=index,
        )
        for index in range(count)
    ]


def generate_requests(session: Any, requests: Any, *, measure_stages: bool = False) -> Any:
    """Import late: the first lines of this file run without torch."""
    from runtime.engine.run import generate_requests as run_them

    return run_them(session, requests, measure_stages=measure_stages)


def _step(generation: Any) -> float:
    return median(generation.step_seconds)


def _memory_bound(session: Any) -> float:
    """Tokens per second if decoding did nothing but read the weights, with both cores at once."""
    import torch

    from runtime.stages.traffic import decode_read_bytes

    torch.set_num_threads(2)
    rate = session.read_bandwidth(repeats=2)["cpu"]
    torch.set_num_threads(1)
    chain = session.chain
    return float(rate / sum(decode_read_bytes(chain, index, batch_size=1) for index in range(len(chain.stages))))


def _cycle(session: Any) -> float:
    """Median seconds between two tokens of a request while several are under way; the first tokens do not count."""
    run = generate_requests(session, _requests(session, IN_FLIGHT, new=NEW_TOKENS))
    return median(run.step_seconds[3:])


def _first_token(session: Any, chunk: int) -> float:
    requests = _requests(session, 1, prompt_tokens=LONG_PROMPT_TOKENS, chunk=chunk, new=1)
    return float(generate_requests(session, requests).time_to_first_token_seconds)


def _formula(session: Any) -> float:
    """Tokens per second by the planner's formula: one per slowest stage, or N per cycle, whichever is slower."""
    generation = generate_requests(session, _requests(session, 1), measure_stages=True)
    steps = len(generation.step_seconds)
    slowest = max(stage.compute_seconds for stage in generation.decode_stages) / steps
    return 1 / max(slowest, _step(generation) / IN_FLIGHT)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], sys.argv[2], sys.argv[3])
    else:
        main()
