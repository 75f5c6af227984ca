"""The simulator of requests against real runs: two processes of one thread each, many requests, several in flight.

For every cut and chunk size two calibration runs with shorter answers give the seconds of each stage, one with a single
request in flight and one with four: stages that work side by side share the memory bus, which the cost model does not
know. From these times alone the simulator predicts longer runs with other numbers of requests, also in flight. That the
machine is faster or slower a minute later shows as an error of the simulator; so each run is also simulated from the
stage times that it had itself, which leaves only what the simulator is responsible for: who waits for whom.

Run: python -m benchmarks simulator
"""

import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import SHAPES, make_checkpoint
from planner.simulate.numbers import numbers_of
from planner.simulate.serving import make_requests, simulate_requests
from plans.cluster import Cluster, Device, Link, Timings
from plans.plan import Plan
from plans.profile import ModelProfile
from plans.workload import Workload
from runtime.distributed.control.launch import LocalWorkers
from runtime.distributed.control.messages import Numbers, StepTime
from runtime.distributed.opening import open_processes
from runtime.distributed.session import ProcessSession, ProcessSettings
from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.prepared import prepare_session
from runtime.reading.opening import open_source

PROMPT_TOKENS, NEW_TOKENS, CALIBRATION_TOKENS = 256, 32, 16
CONTEXT = 512
DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Case:
    """One real run: layers of the two stages, prompt tokens per step, requests altogether and at once."""

    layers: tuple[int, int]
    chunk: int
    requests: int
    in_flight: int


CASES = (
    Case((6, 6), 256, 4, 1),
    Case((6, 6), 256, 8, 2),
    Case((6, 6), 256, 10, 3),
    Case((6, 6), 64, 4, 1),
    Case((6, 6), 64, 9, 3),
    Case((9, 3), 256, 6, 2),
    Case((9, 3), 64, 8, 4),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run, real or simulated, came to."""

    tokens_per_second: float
    time_to_first_token_seconds: float
    """The median, from the moment a request is let into the chain."""


def main() -> None:
    """Print for every case the real run, the simulated ones, and by how much they are off."""
    import torch

    torch.set_num_threads(1)
    print(f"100M {DTYPE}, 2 processes of 1 thread, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, all requests at once")
    with tempfile.TemporaryDirectory() as temp:
        model = make_checkpoint(SHAPES["100M"], Path(temp), dtype=DTYPE)
        for setup in dict.fromkeys((case.layers, case.chunk) for case in CASES):
            _compare(model, Path(temp), [case for case in CASES if (case.layers, case.chunk) == setup])


def _compare(model: Path, folder: Path, cases: Sequence[Case]) -> None:
    from planner import analyze_model, solve_model

    first, profile = cases[0], analyze_model(model)
    plan_file = folder / "plan.json"
    plan = solve_model(model, devices=["cpu=2GiB"] * 2, layers=first.layers, ctx_size=CONTEXT)
    plan_file.write_text(plan.to_json())
    prepared = prepare_session(open_source(plan_file, model=model), device_map={}, context_tokens=CONTEXT)
    settings = ProcessSettings(workers=LocalWorkers(plan_file, model=model), threads=1, traces=True)
    with open_processes(prepared, settings, cache_tokens=PROMPT_TOKENS + NEW_TOKENS, batch_size=4) as session:
        alone, busy = (_calibrate(session, replace(first, in_flight=n)) for n in (1, 4))
        for case in cases:
            real = _run(session, case, NEW_TOKENS)
            itself = _all_seconds(session.take_numbers())
            before = alone if case.in_flight == 1 else busy
            print(f"  layers {case.layers}, chunks of {case.chunk:3}, {case.in_flight} in flight: {_words(real)}")
            for name, times in (("calibrated before", before), ("its own stage times", itself)):
                simulated = _simulate(profile, case, times, hops=alone)
                print(f"    {name:20} {_words(simulated)}; {_errors(simulated, real)}", flush=True)


def _words(seen: Seen) -> str:
    return f"{seen.tokens_per_second:.3g} tokens/s, first token {seen.time_to_first_token_seconds:.3g} s"


def _errors(simulated: Seen, real: Seen) -> str:
    rate = simulated.tokens_per_second / real.tokens_per_second - 1
    first = simulated.time_to_first_token_seconds / real.time_to_first_token_seconds - 1
    return f"off by {rate:+.1%} and {first:+.1%}"


def _run(session: ProcessSession, case: Case, new_tokens: int) -> Seen:
    draw = random.Random(0)
    limits = Limits(
        context_tokens=CONTEXT, max_tokens=new_tokens, prefill_chunk_tokens=case.chunk, eos_token_ids=frozenset()
    )
    engine, heard = Engine(session, num_slots=case.in_flight), [Heard() for _ in range(case.requests)]
    started = time.perf_counter()
    for one in heard:
        engine.submit(_request(draw, session.prepared.vocab_size, limits), on_event=one)
    engine.run_all()
    seconds = time.perf_counter() - started
    first = statistics.median(one.first_token_seconds for one in heard)
    return Seen(sum(len(one.token_ids) for one in heard) / seconds, first)


def _request(draw: random.Random, vocab_size: int, limits: Limits) -> Request:
    prompt = [draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)]
    return Request(prompt_ids=prompt, sampling=Sampling(temperature=0.0), limits=limits)


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Means of one stage: a decode step and every chunk of the prompt; and the median of the way to the next stage."""

    decode: float
    chunks: tuple[float, ...]
    hop: float


def _calibrate(session: ProcessSession, case: Case) -> list[StageSeconds]:
    session.take_numbers()
    _run(session, replace(case, requests=case.in_flight), 2)  # the first steps of a process are slow
    session.take_numbers()
    _run(session, replace(case, requests=max(3, 2 * case.in_flight)), CALIBRATION_TOKENS)
    return _all_seconds(session.take_numbers())


def _all_seconds(numbers: Sequence[Numbers]) -> list[StageSeconds]:
    return [_stage_seconds(stage, numbers[(index + 1) % len(numbers)]) for index, stage in enumerate(numbers)]


def _stage_seconds(stage: Numbers, following: Numbers) -> StageSeconds:
    chunks: dict[int, list[float]] = defaultdict(list)
    for step in stage.steps:
        if step.is_prefill:
            chunks[step.step].append(step.end_seconds - step.start_seconds)
    decode = statistics.fmean(s.end_seconds - s.start_seconds for s in stage.steps if not s.is_prefill)
    means = tuple(statistics.fmean(chunks[step]) for step in sorted(chunks))
    return StageSeconds(decode, means, _hop_seconds(stage.steps, following.steps))


def _hop_seconds(steps: Sequence[StepTime], following: Sequence[StepTime]) -> float:
    """From the end of a decode step here to its start on the next stage (or of the next step on the first)."""
    starts = {(s.group, s.step): s.start_seconds for s in following if not s.is_prefill}
    ends = {(s.group, s.step): s.end_seconds for s in steps if not s.is_prefill}
    same = [starts[key] - end for key, end in ends.items() if key in starts]
    later = [starts[g, n + 1] - end for (g, n), end in ends.items() if (g, n + 1) in starts]
    return max(0.0, statistics.median(same if statistics.median(same) > 0 else later))


def _simulate(
    profile: ModelProfile, case: Case, times: Sequence[StageSeconds], *, hops: Sequence[StageSeconds]
) -> Seen:
    plan = _plan(profile, case, times, hops)
    coming = make_requests(
        case.requests, rate=None, process="uniform", prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, seed=0
    )
    served = simulate_requests(plan, requests=coming)
    first = statistics.median((served.first_token - served.arrived).tolist())
    return Seen(numbers_of(served).tokens_per_second, first)


def _plan(profile: ModelProfile, case: Case, times: Sequence[StageSeconds], hops: Sequence[StageSeconds]) -> Plan:
    """The same cut on devices that take the measured times."""
    from planner.answers.solve import solve
    from planner.problem.question import Question
    from plans.plan import Demands

    workload = Workload(
        prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, context_tokens=CONTEXT, prefill_chunk_tokens=case.chunk,
        requests_in_flight=case.in_flight, dtype=profile.dtype, kv_cache_dtype=profile.kv_cache_dtype,
    )  # fmt: skip
    devices = tuple(
        _device(f"cpu#{index}", stage, layers, case.chunk)
        for index, (stage, layers) in enumerate(zip(times, case.layers, strict=True))
    )
    names = [device.name for device in devices]
    links = tuple(
        Link(**{"from": names[i]}, to=names[1 - i], bandwidth_bytes_per_second=2e9, latency_seconds=hops[i].hop)
        for i in range(2)
    )
    cluster = Cluster(devices=devices, links=links)
    demands = Demands(layers=",".join(map(str, case.layers)))
    return solve(Question(profile, cluster, workload, "custom", execution="process_per_stage", demands=demands))


def _device(name: str, stage: StageSeconds, layers: int, chunk: int) -> Device:
    """A device whose layers together take what the whole stage took, ends included."""
    chunks = tuple((chunk, chunk * i, 1, seconds / layers) for i, seconds in enumerate(stage.chunks))
    timings = Timings(
        profile="*",
        dtype="fp32",
        threads=1,
        decode_seconds_per_layer=((PROMPT_TOKENS + CALIBRATION_TOKENS // 2, 1, stage.decode / layers),),
        prefill_seconds_per_layer=chunks,
        embedding_seconds=((1, 0.0),),
        head_seconds=((1, 0.0),),
    )
    return Device(
        name=name, kind="cpu", memory_bytes=8 << 30, budget_bytes=8 << 30, timings=(timings,),
        memory_bandwidth_bytes_per_second=1e10, flops_per_second={"fp32": 5e10},
    )  # fmt: skip


if __name__ == "__main__":
    main()
