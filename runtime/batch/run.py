"""Run the jobs of a batch file, the longest first, so that no long one is left over at the end."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.batch.input import Job
from runtime.batch.output import ResultFile
from runtime.engine.engine import Engine
from runtime.engine.events import Done, Event, Failed
from runtime.engine.heard import Heard
from runtime.generate.writer import GeneratedSequence
from runtime.prepared import Prepared
from runtime.reading.capacity import memory_faults
from runtime.session import AnySession


@dataclass(slots=True)
class BatchNumbers:
    """What a run did (an earlier run's results are not counted)."""

    num_lines: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second, reading the prompts included."""
        return self.num_new_tokens / self.seconds if self.seconds else 0.0


def model_id(prepared: Prepared) -> str:
    """Return what tells a model from others: the export id, else configuration and headers; and the dtypes."""
    dtypes, source = f"{prepared.dtype} {prepared.kv_cache_dtype}", prepared.source
    if source.export is not None:
        return f"{source.export.export_id} {dtypes}"
    checkpoint = source.checkpoint
    headers = [shard.header.header_sha256 for shard in checkpoint.shards]
    return f"{hashlib.sha256(' '.join([checkpoint.config.sha256, *headers]).encode()).hexdigest()} {dtypes}"


def run_jobs(
    session: AnySession,
    jobs: Sequence[Job],
    results: ResultFile,
    *,
    batch_size: int,
    on_line: Callable[[], None] = lambda: None,
) -> BatchNumbers:
    """Run the jobs that have no result yet; a line that is done makes place for the next.

    Args:
        session: the model.
        jobs: every line of the input.
        results: where results go, one by one.
        batch_size: sequences at once.
        on_line: told of every line that was finished.
    """
    numbers, started = BatchNumbers(), time.perf_counter()
    waiting = sorted((job for job in jobs if job.index not in results.done), key=lambda job: -job.num_tokens)
    engine = Engine(
        session,
        num_slots=min(batch_size, max(len(waiting), 1)),
        cache_tokens=max((job.num_tokens for job in waiting), default=1),
        reads_first=True,
    )

    def listen(job: Job, heard: Heard, event: Event) -> None:
        heard(event)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            results.append([_result(job, heard.sequence())])
            numbers.num_lines += 1
            numbers.num_prompt_tokens += event.usage.num_prompt_tokens
            numbers.num_new_tokens += event.usage.num_new_tokens
            numbers.seconds = time.perf_counter() - started
            on_line()

    with memory_faults(f"running {batch_size} lines at once"):
        for job in waiting:
            engine.submit(job.request, on_event=partial(listen, job, Heard()))
        engine.run_all()
    results.finish()
    return numbers


def _result(job: Job, sequence: GeneratedSequence) -> dict[str, Any]:
    return {
        "index": job.index,
        **({} if job.id is None else {"id": job.id}),
        "text": sequence.text,
        "token_ids": list(sequence.token_ids),
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": len(job.request.prompt_ids),
        "request_sha256": job.sha256,
    }
