"""The report's timelines: who is busy when, in the prefill of one prompt and in decode with all requests in flight."""

from collections.abc import Iterator, Sequence

from planner.report.drawing import Drawing, Path, Rect, Shape, Text, clipped, nice_ticks
from planner.show.words import duration
from planner.simulate.one_plan import Event, Simulation
from plans.plan import Plan

WIDTH = 960
LEFT = 170
DEVICE_ROW, LINK_ROW = 26, 14
MOST_EVENTS = 360
"""Enough to see the rhythm; a trace has them all."""
MOST_ROWS_WITH_LINKS = 40
COLOURS = 8
LEAST_WIDTH = 0.75
WORDS = {"prefill": "chunk", "decode": "decode step", "hop": "hop of step", "return": "token ids of step"}


def prefill_drawing(simulation: Simulation, plan: Plan) -> Drawing:
    """Return the timeline of one prompt; colours stand for its chunks."""
    events = simulation.prefill_events[:MOST_EVENTS]
    chunks = len(plan.workload.prefill_chunks)
    what = f"{plan.workload.prompt_tokens} tokens in {chunks} chunk{'s' if chunks > 1 else ''}"
    title = f"Prefill of one prompt: {what}, {duration(simulation.time_to_first_token_seconds)} to the first token"
    return _timeline("prefill", title, events, by_request=False)


def decode_drawing(simulation: Simulation, plan: Plan) -> Drawing:
    """Return the timeline of the first decode steps; colours stand for requests."""
    events = decode_window(simulation.decode_events)
    num = plan.workload.requests_in_flight
    rate = simulation.pipelined_tokens_per_second if num > 1 else simulation.tokens_per_second
    what = f"{num} requests in flight" if num > 1 else "one request"
    return _timeline("decode", f"Decode with {what}: {rate:.4g} tokens/s", events, by_request=num > 1)


def decode_window(events: Sequence[Event]) -> list[Event]:
    """Return the events of the first steps: three of every request, fewer where that would be too many to see."""
    ordered = sorted(events, key=lambda event: (event.start_seconds, event.end_seconds))
    first = [event for event in ordered if event.step < 3]
    return first[:MOST_EVENTS]


def _timeline(name: str, title: str, events: Sequence[Event], *, by_request: bool) -> Drawing:
    resources = _resources(events)
    shown = [event for event in events if event.resource in resources]
    tops, height = _tops(resources)
    end = max((event.end_seconds for event in shown), default=0.0)
    scale = (WIDTH - LEFT - 12) / end if end else 0.0
    shapes = [
        *_axis(end, scale, height),
        *_labels(resources, tops),
        *(_bar(event, tops[event.resource], scale, by_request=by_request) for event in shown),
    ]
    busy = _busy_words(resources, shown, end)
    return Drawing(name, title, busy, WIDTH, height + 26, shapes)


def _resources(events: Sequence[Event]) -> dict[str, bool]:
    """Devices and links in the order in which they are first used; True for a device."""
    found = dict.fromkeys(event.resource for event in events if event.end_seconds > event.start_seconds)
    is_device = {event.resource: event.kind in ("prefill", "decode") for event in events}
    if len(found) > MOST_ROWS_WITH_LINKS:
        return {name: True for name in found if is_device[name]}
    return {name: is_device[name] for name in found}


def _tops(resources: dict[str, bool]) -> tuple[dict[str, float], float]:
    tops, top = {}, 4.0
    for name, is_device in resources.items():
        tops[name] = top
        top += DEVICE_ROW if is_device else LINK_ROW
    return tops, top


def _axis(end: float, scale: float, height: float) -> Iterator[Shape]:
    for tick in nice_ticks(end, count=6):
        x = LEFT + tick * scale
        yield Path(f"M{x:.1f} 0V{height:.1f}", "grid")
        yield Text(x, height + 18, duration(tick) if tick else "0", "label quiet small", "middle")


def _labels(resources: dict[str, bool], tops: dict[str, float]) -> Iterator[Shape]:
    for name, is_device in resources.items():
        y = tops[name] + (17 if is_device else 10)
        css = "label" if is_device else "label quiet tiny"
        yield Text(LEFT - 10, y, clipped(name, LEFT - 14, size=12 if is_device else 9.5), css, "end", name)


def _bar(event: Event, top: float, scale: float, *, by_request: bool) -> Rect:
    x = LEFT + event.start_seconds * scale
    width = max(LEAST_WIDTH, (event.end_seconds - event.start_seconds) * scale)
    is_device = event.kind in ("prefill", "decode")
    colour = (event.request if by_request else event.step) % COLOURS
    what = WORDS[event.kind]
    of_request = f" of request {event.request}" if by_request else ""
    title = (
        f"{event.resource}: {what} {event.step}{of_request}, {duration(event.end_seconds - event.start_seconds)} "
        f"from {duration(event.start_seconds) if event.start_seconds else '0'}"
    )
    if is_device:
        return Rect(x, top + 2, width, DEVICE_ROW - 6, f"span c{colour}", title, radius=min(2.0, width / 2))
    return Rect(x, top + 3, width, LINK_ROW - 7, f"span c{colour}", title)


def _busy_words(resources: dict[str, bool], events: Sequence[Event], end: float) -> str:
    parts = []
    for name in resources:
        busy = sum(event.end_seconds - event.start_seconds for event in events if event.resource == name)
        parts.append(f"{name} busy {busy / end:.0%} of the time shown" if end else name)
    return "; ".join(parts)
