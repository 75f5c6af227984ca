"""What every stage really did, in the format that `llamaplan` writes its predictions in (Perfetto, chrome://tracing).

Format: the JSON object form of the Trace Event Format, complete events ("ph": "X"), times in microseconds. Times of
several hosts are comparable as far as their clocks are.
"""

from collections.abc import Sequence
from typing import Any

from plans.stages import describe_stage
from runtime.distributed.control.messages import Numbers, StepTime
from runtime.stage_view import StageView

_PHASES = ((1, "prefill", True), (2, "decode", False))


def trace_document(numbers: Sequence[Numbers], views: Sequence[StageView]) -> dict[str, Any]:
    """Return the trace of the steps that the stages kept: one process per phase, one track per stage."""
    first = min((step.start_seconds for stage in numbers for step in stage.steps), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, title, is_prefill in _PHASES:
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": title}})
        for tid, (stage, view) in enumerate(zip(numbers, views, strict=True), start=1):
            name = f"{view.device}: {describe_stage(view.spec)}"
            events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}})
            events += [
                _event(step, title, pid=pid, tid=tid, origin_seconds=first)
                for step in stage.steps
                if step.is_prefill == is_prefill
            ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _event(step: StepTime, kind: str, *, pid: int, tid: int, origin_seconds: float) -> dict[str, Any]:
    return {
        "name": f"{kind} {step.step} of request {step.group}",
        "cat": kind,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": (step.start_seconds - origin_seconds) * 1e6,
        "dur": (step.end_seconds - step.start_seconds) * 1e6,
    }
