"""A simulation as a trace that Perfetto and chrome://tracing open.

Format: the JSON object form of the Trace Event Format, complete events ("ph": "X"), times in microseconds.
"""

from collections.abc import Sequence
from typing import Any

from planner.simulate.one_plan import Event, Simulation

_PHASES = ("prefill of one prompt", "decode, all requests in flight")
MAX_EVENTS = 20_000


def trace(simulation: Simulation) -> dict[str, Any]:
    """Return the trace of a simulation: one process per phase, one track per device and link.

    Decode is cut after `MAX_EVENTS` events; by then it has long been periodic.
    """
    timelines = (simulation.prefill_events, simulation.decode_events[:MAX_EVENTS])
    return events_trace(list(zip(_PHASES, timelines, strict=True)))


def events_trace(timelines: Sequence[tuple[str, Sequence[Event]]]) -> dict[str, Any]:
    """Return the trace of (title, events): one process each, with one track per device and link."""
    events: list[dict[str, Any]] = []
    for pid, (title, timeline) in enumerate(timelines, start=1):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": title}})
        events += _tracks(pid, timeline)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _tracks(pid: int, timeline: Sequence[Event]) -> list[dict[str, Any]]:
    tracks = {name: number for number, name in enumerate(dict.fromkeys(e.resource for e in timeline), start=1)}
    named = [
        {"name": "thread_name", "ph": "M", "pid": pid, "tid": number, "args": {"name": name}}
        for name, number in tracks.items()
    ]
    return named + [
        {
            "name": f"{event.kind} {event.step} of request {event.request}",
            "cat": event.kind,
            "ph": "X",
            "pid": pid,
            "tid": tracks[event.resource],
            "ts": event.start_seconds * 1e6,
            "dur": (event.end_seconds - event.start_seconds) * 1e6,
        }
        for event in timeline
    ]
