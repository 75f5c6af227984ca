"""The seconds one stage spends, and when, kept while a thread may ask for them at any time."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from runtime.distributed.control.messages import Numbers, StepTime
from runtime.reading.capacity import peak_memory_bytes
from runtime.stage_time import StageTime, StageView

MAX_STEPS = 200_000
"""Steps kept for a trace."""


class StageClock:
    """Totals since they were last taken.

    Args:
        traces: whether every step is kept as well.
        is_fast: whether decode steps use the native kernels.
    """

    def __init__(self, *, traces: bool, is_fast: bool) -> None:
        self._traces, self._is_fast = traces, is_fast
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._prefill, self._decode = StageTime(), StageTime()
        self._steps: list[StepTime] = []

    @contextmanager
    def step(self, *, sequence: int, step: int, is_prefill: bool, hop_seconds: float) -> Iterator[None]:
        """Measure the block as one step."""
        began, started = time.time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        with self._lock:
            total = self._prefill if is_prefill else self._decode
            total.compute_seconds += seconds
            total.hop_seconds += hop_seconds
            total.num_fast_steps += self._is_fast and not is_prefill
            if self._traces and len(self._steps) < MAX_STEPS:
                self._steps.append(
                    StepTime(
                        sequence=sequence,
                        step=step,
                        is_prefill=is_prefill,
                        start_seconds=began,
                        end_seconds=began + seconds,
                    )
                )

    def take(self, request: int = 0) -> Numbers:
        """Return the totals and start anew."""
        with self._lock:
            numbers = Numbers(
                request=request,
                prefill_compute_seconds=self._prefill.compute_seconds,
                prefill_hop_seconds=self._prefill.hop_seconds,
                decode_compute_seconds=self._decode.compute_seconds,
                decode_hop_seconds=self._decode.hop_seconds,
                decode_fast_steps=self._decode.num_fast_steps,
                peak_memory_bytes=peak_memory_bytes(),
                steps=tuple(self._steps),
            )
            self._reset()
        return numbers


_PHASES = ((1, "prefill", True), (2, "decode", False))


def trace_document(numbers: Sequence[Numbers], views: Sequence[StageView]) -> dict[str, Any]:
    """Return the trace of the steps that the stages kept: one process per phase, one track per stage."""
    first = min((step.start_seconds for stage in numbers for step in stage.steps), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, title, is_prefill in _PHASES:
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": title}})
        for tid, (stage, view) in enumerate(zip(numbers, views, strict=True), start=1):
            name = f"{view.device}: {view.spec.words}"
            events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})
            events += [
                _event(step, title, pid=pid, tid=tid, origin_seconds=first)
                for step in stage.steps
                if step.is_prefill == is_prefill
            ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _event(step: StepTime, kind: str, *, pid: int, tid: int, origin_seconds: float) -> dict[str, Any]:
    return {
        "name": f"{kind} {step.step} of request {step.sequence}",
        "cat": kind,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": (step.start_seconds - origin_seconds) * 1e6,
        "dur": (step.end_seconds - step.start_seconds) * 1e6,
    }
