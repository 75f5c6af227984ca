"""Measure a loaded chain: prefill, decode and every stage, against this machine's bandwidth and the plan."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from plans.run import Bench, PredictedStage, RunPrediction
from runtime.engine.run import generate_requests
from runtime.generate.limits import Limits
from runtime.generate.request import Generation, Request
from runtime.generate.sampling import Sampling
from runtime.reading.capacity import memory_faults
from runtime.results.summary import identity, stage_documents, stage_lines
from runtime.session import AnySession
from runtime.stage_time import StageTime


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt_tokens: per sequence; random token ids.
        new_tokens: per sequence; at least 2, chosen greedily, never ended early.
        batch_size: sequences at once.
        repeats: medians are taken over so many runs, after one that does not count.
        prefill_chunk_tokens: prompt tokens per step.
        in_flight: batches under way at once, where stages run in processes of their own.
        traces: whether the last run is one for a trace, even with one batch in flight.
    """

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    prefill_chunk_tokens: int
    in_flight: int = 1
    traces: bool = False


def bench_document(session: AnySession, settings: BenchSettings) -> Bench:
    """Measure, with `stages` as a run's document has them.

    Totals come from runs without stage clocks, stages from runs with them; the two take turns. Stage seconds are the
    medians of one run's totals.
    """
    requests = _requests(session, settings)
    with memory_faults("measuring"):
        _run(session, requests, measure_stages=False)
        pairs = [
            (_run(session, requests, measure_stages=False), _run(session, requests, measure_stages=True))
            for _ in range(settings.repeats)
        ]
    peak_memory_bytes = session.peak_memory_bytes  # reading all weights once is none of the run's business
    plain, clocked = [first for first, _ in pairs], [second for _, second in pairs]
    step_seconds = median(median(run.step_seconds) for run in plain)
    prefill_seconds = median(run.time_to_first_token_seconds for run in plain)
    stages = stage_documents(session, _median_run(clocked))
    read = sum(stage.decode_read_bytes for stage in stages)
    return Bench(
        **identity(session),
        kind="bench",
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        repeats=settings.repeats,
        time_to_first_token_seconds=prefill_seconds,
        prefill_tokens_per_second=settings.batch_size * settings.prompt_tokens / prefill_seconds,
        median_seconds_per_token=step_seconds,
        tokens_per_second=settings.batch_size / step_seconds,
        decode_read_bytes=read,
        decode_read_bytes_per_second=read / step_seconds,
        read_bandwidth_bytes_per_second=session.read_bandwidth(repeats=settings.repeats),
        peak_memory_bytes=peak_memory_bytes,
        in_flight=settings.in_flight,
        pipelined_tokens_per_second=_pipelined_rate(session, requests, settings),
        stages=stages,
        prediction=_prediction(session),
    )


def _pipelined_rate(session: AnySession, requests: Sequence[Request], settings: BenchSettings) -> float | None:
    """Measure several batches under way at once: their tokens per second once all of them are decoding."""
    if settings.in_flight == 1 and not settings.traces:
        return None
    run = _run(session, [*requests] * settings.in_flight, measure_stages=False)
    return settings.in_flight * settings.batch_size / median(run.step_seconds)


def _requests(session: AnySession, settings: BenchSettings) -> list[Request]:
    prepared = session.prepared
    draw = random.Random(0)
    limits = Limits(
        context_tokens=prepared.context_tokens,
        max_tokens=settings.new_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
    )
    return [
        Request(
            prompt_ids=[draw.randrange(prepared.vocab_size) for _ in range(settings.prompt_tokens)],
            sampling=Sampling(),
            limits=limits,
            sequence_index=index,
        )
        for index in range(settings.batch_size)
    ]


def _run(session: AnySession, requests: Sequence[Request], *, measure_stages: bool) -> Generation:
    return generate_requests(session, requests, measure_stages=measure_stages)


def _median_run(runs: Sequence[Generation]) -> Generation:
    """Return the first run with the stage times replaced by medians over all."""
    prefill = _medians([run.prefill_stages for run in runs])
    decode = _medians([run.decode_stages for run in runs])
    return replace(runs[0], prefill_stages=prefill, decode_stages=decode)


def _medians(runs: Sequence[Sequence[StageTime]]) -> tuple[StageTime, ...]:
    return tuple(
        StageTime(
            median(time.compute_seconds for time in times),
            median(time.hop_seconds for time in times),
            median(time.cache_seconds for time in times),
            times[0].num_fast_steps,
        )
        for times in zip(*runs, strict=True)
    )


def _prediction(session: AnySession) -> RunPrediction | None:
    plan = session.source.plan
    if plan is None:
        return None
    return RunPrediction(
        time_to_first_token_seconds=plan.prediction.time_to_first_token_seconds,
        seconds_per_token=plan.prediction.seconds_per_token,
        pipelined_tokens_per_second=plan.prediction.pipelined_tokens_per_second,
        requests_in_flight=plan.workload.requests_in_flight,
        prompt_tokens=plan.workload.prompt_tokens,
        batch_size=plan.workload.batch_size,
        stages=tuple(
            PredictedStage(
                device=stage.device,
                prefill_seconds=stage.prefill_seconds,
                decode_seconds=stage.decode_seconds,
                hop_seconds=stage.hop_seconds,
            )
            for stage in plan.stages
        ),
    )


def bench_lines(bench: Bench) -> Iterator[str]:
    """Yield the totals and every stage in words."""
    first, step, read = bench.time_to_first_token_seconds, bench.median_seconds_per_token or 0.0, bench.decode_rate
    yield (
        f"{bench.prompt_tokens} prompt tokens, {bench.new_tokens} new tokens, batch size {bench.batch_size}, "
        f"{bench.dtype}, median of {bench.repeats}"
    )
    yield f"load     {bench.load_seconds:.2f} s"
    yield f"prefill  {1000 * first:.1f} ms, {bench.prefill_tokens_per_second:.0f} tokens/s"
    yield (
        f"decode   {1000 * step:.2f} ms/token, {bench.tokens_per_second:.1f} tokens/s, {read / 1e9:.1f} GB/s of weights"
    )
    for device, rate in bench.read_bandwidth_bytes_per_second.items():
        yield f"reading  {rate / 1e9:.1f} GB/s on {device} (its weights summed up); decode is at {read / rate:.0%}"
    if bench.in_flight > 1:
        rate = bench.pipelined_tokens_per_second or 0.0
        yield f"in flight {rate:.1f} tokens/s with {bench.in_flight} batches under way at once"
    if bench.prediction is not None:
        yield _prediction_line(bench.prediction, step)
    yield from stage_lines(bench)


def _prediction_line(predicted: RunPrediction, measured_seconds: float) -> str:
    step, first = predicted.seconds_per_token, predicted.time_to_first_token_seconds
    if not step:
        return "plan     predicts nothing"
    return (
        f"plan     predicted {1000 * first:.1f} ms to the first token and {1000 * step:.2f} ms/token for "
        f"{predicted.prompt_tokens} prompt tokens, batch size {predicted.batch_size}: measured decode takes "
        f"{measured_seconds / step:.2f} x that"
    )
