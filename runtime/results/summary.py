"""The numbers at the end of a run: what a person reads, and what `--json` writes for the planner to read back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from plans.errors import printable
from plans.reading.sizes import format_bytes
from plans.run import Run, RunSequence, RunStage, TimedRun
from runtime.generate.request import Generation
from runtime.session import AnySession
from runtime.stage_time import StageTime, StepTrace


class Walk:
    """Writes a few lines for every step: stages, shapes, seconds, and the token that came out.

    Args:
        session: the model.
        write: receives one line at a time.
    """

    def __init__(self, session: AnySession, *, write: Callable[[str], None]) -> None:
        self._session = session
        self._views = session.stage_views(batch_size=1)
        self._config = session.source.checkpoint.config
        self._write = write

    def __call__(self, trace: StepTrace) -> None:
        name = "prefill" if trace.step == 0 else f"decode {trace.step}"
        self._write(f"{name}: {trace.num_tokens} tokens, {trace.num_past_tokens} in the cache")
        for index in range(len(trace.stages)):
            self._write(self._stage_line(index, trace))
        for token in trace.token_ids:
            self._write(f"  -> token {token} '{printable(self._session.prepared.tokenizer.decode([token]))}'")

    def _stage_line(self, index: int, trace: StepTrace) -> str:
        view, times = self._views[index], trace.stages[index]
        return (
            f"  stage {index} on {view.device} ({view.spec.words}): "
            f"{self._input_shape(index, trace)} -> {self._output_shape(index, trace)}, "
            f"hop {1000 * times.hop_seconds:.3f} ms, compute {1000 * times.compute_seconds:.2f} ms ({times.path})"
        )

    def _input_shape(self, index: int, trace: StepTrace) -> str:
        shape = [trace.batch_size, trace.num_tokens]
        return f"ids {shape}" if index == 0 else f"hidden {[*shape, self._config.hidden_size]}"

    def _output_shape(self, index: int, trace: StepTrace) -> str:
        config = self._config
        if index == len(trace.stages) - 1:
            return f"logits {[trace.batch_size, 1, config.vocab_size]}"
        return f"hidden {[trace.batch_size, trace.num_tokens, config.hidden_size]}"


def run_document(session: AnySession, generation: Generation) -> Run:
    """Return everything a run measured."""
    return Run(
        **identity(session),
        kind="run",
        prompt_tokens=generation.num_prompt_tokens,
        new_tokens=generation.num_new_tokens,
        batch_size=len(generation.sequences),
        time_to_first_token_seconds=generation.time_to_first_token_seconds,
        tokens_per_second=generation.decode_tokens_per_second,
        median_seconds_per_token=median(generation.step_seconds) if generation.step_seconds else None,
        peak_memory_bytes=session.peak_memory_bytes,
        stages=stage_documents(session, generation),
        sequences=tuple(
            RunSequence(text=s.text, token_ids=tuple(s.token_ids), finish_reason=s.finish_reason)
            for s in generation.sequences
        ),
    )


def identity(session: AnySession) -> dict[str, Any]:
    """Return what says in every document which model was measured, and how long it took to load."""
    source = session.source
    return {
        "schema_version": 1,
        "plan_sha256": source.plan.sha256 if source.plan else None,
        "export_id": source.export.export_id if source.export else None,
        "config_sha256": source.checkpoint.config.sha256,
        "dtype": session.dtype_name,
        "load_seconds": session.load_seconds,
    }


def stage_documents(session: AnySession, generation: Generation) -> tuple[RunStage, ...]:
    """Return, per stage, what it is and its seconds: totals of the run, and bytes read per decode step."""
    views = session.stage_views(batch_size=len(generation.sequences))
    return tuple(
        RunStage(
            **asdict(view.spec) | {"device": view.device},
            planned_device=view.spec.device,
            decode_steps=len(generation.step_seconds),
            decode_read_bytes=view.decode_read_bytes,
            **_path(generation, index),
            **_seconds("prefill", generation.prefill_stages, index),
            **_seconds("decode", generation.decode_stages, index),
        )
        for index, view in enumerate(views)
    )


def _path(generation: Generation, index: int) -> dict[str, Any]:
    """Return which path served: for decode steps if there were any."""
    times = generation.decode_stages if generation.step_seconds else generation.prefill_stages
    return {"path": times[index].path} if times else {}


def _seconds(phase: str, times: Sequence[StageTime], index: int) -> dict[str, Any]:
    names = ("compute_seconds", "hop_seconds", "cache_seconds")
    return {f"{phase}_{name}": getattr(times[index], name) for name in names} if times else {}


def summary_lines(run: Run) -> list[str]:
    """Return the lines a person sees after the text."""
    tokens = f"{run.prompt_tokens} prompt tokens, {run.new_tokens} new tokens"
    speed = f"time to first token {1000 * run.time_to_first_token_seconds:.0f} ms, then "
    speed += f"{run.tokens_per_second:.1f} tokens/s"
    speed += f" ({run.decode_rate / 1e9:.1f} GB/s of weights)" if run.decode_rate else ""
    rest = f"loaded in {run.load_seconds:.1f} s; peak memory {format_bytes(run.peak_memory_bytes)}"
    return [f"{tokens} ({run.sequences[0].finish_reason})", f"{speed}; {rest}", *stage_lines(run)]


def stage_lines(run: TimedRun) -> Iterator[str]:
    """Yield every stage's seconds in words."""
    for number, stage in enumerate(run.stages):
        name = f"  stage {number} on {stage.device}: {stage.range.words}"
        if stage.path is None:
            yield name
            continue
        steps = max(1, stage.decode_steps)
        compute, hop, cache = (
            seconds / steps
            for seconds in (stage.decode_compute_seconds, stage.decode_hop_seconds, stage.decode_cache_seconds)
        )
        rate = stage.decode_read_bytes / compute / 1e9 if compute else 0.0
        yield (
            f"{name}: prefill {1000 * stage.prefill_compute_seconds:.1f} ms, "
            f"decode {1000 * compute:.2f} ms/token ({rate:.1f} GB/s; cache {1000 * cache:.2f} ms), "
            f"hop {1000 * hop:.3f} ms/token ({stage.path})"
        )
