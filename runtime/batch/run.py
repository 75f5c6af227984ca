"""Run the jobs of a batch file: sorted by length, so that little is padded, and a batch at a time."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.batch.input import Job
from runtime.batch.output import ResultFile
from runtime.generate.loop import Generation
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
    in_flight: int = 1,
    on_batch: Callable[[int], None] = lambda _lines: None,
) -> BatchNumbers:
    """Run the jobs that have no result yet.

    Args:
        session: the model.
        jobs: every line of the input.
        results: where results go, a batch at a time.
        batch_size: sequences at once.
        in_flight: such batches under way at once, where stages run in processes of their own.
        on_batch: told how many lines were finished.
    """
    numbers, started = BatchNumbers(), time.perf_counter()
    waiting = sorted(
        (job for job in jobs if job.index not in results.done), key=lambda job: -len(job.request.prompt_ids)
    )
    batches = [waiting[first : first + batch_size] for first in range(0, len(waiting), batch_size)]

    def keep(place: int, generation: Generation) -> None:
        batch = batches[place]
        results.append([_result(job, sequence) for job, sequence in zip(batch, generation.sequences, strict=True)])
        numbers.num_lines += len(batch)
        numbers.num_prompt_tokens += generation.num_prompt_tokens
        numbers.num_new_tokens += generation.num_new_tokens
        numbers.seconds = time.perf_counter() - started
        on_batch(len(batch))

    with memory_faults(f"running {batch_size} lines at once"):
        session.generate_groups(
            [[job.request for job in batch] for batch in batches],
            in_flight=in_flight,
            decode=session.prepared.decode,
            on_done=keep,
        )
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
