"""An event-driven simulation of a chain, independent of the formulas that predict it.

It knows only how long a unit takes on a device and a message between two devices, and lets things happen: a stage works
on one batch at a time, first come first served; a link carries one message at a time; a batch goes round the chain and
back once per token. What comes out is compared with `planner.timing.costs.predict` (tests/planner/test_simulate.py)
and used to score any chain, whoever proposed it.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from planner.timing.costs import CostModel
from plans.errors import InfeasibleError
from plans.plan import Plan
from plans.stages import StageRange

EventKind = Literal["prefill", "decode", "hop", "return"]
SETTLING_ROUNDS = 3
"""Tokens per request before the steady state is measured, and again while it is: with constant times a closed chain is
periodic once its slowest part has spaced the requests out, which takes one round."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that kept a device or a link busy. Requests, steps and chunks count from 0."""

    kind: EventKind
    resource: str
    """A device, or ``a -> b`` for a link."""
    request: int
    step: int
    """Decode step of the request, or chunk of its prompt."""
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened: the same quantities as `plans.plan.Prediction`, and the timelines they were read from."""

    time_to_first_token_seconds: float
    seconds_per_token: float
    step_period_seconds: float
    """Time between two decode steps leaving the chain, with all requests in flight."""
    tokens_per_second: float
    pipelined_tokens_per_second: float
    busy_shares: tuple[float, ...]
    """How much of the steady state each stage was computing."""
    prefill_events: tuple[Event, ...]
    decode_events: tuple[Event, ...]
    """From the first step on, with all requests in flight."""


@dataclass(frozen=True, slots=True)
class _Visit:
    """One stop of a batch on its way: what it occupies, and for how long."""

    kind: EventKind
    resource: str
    seconds: float


def simulate_plan(plan: Plan) -> Simulation:
    """Simulate a plan, whoever wrote it; errors as `simulate`."""
    model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution)
    return simulate(model, stages=plan.ranges)


def simulate(model: CostModel, *, stages: Sequence[StageRange]) -> Simulation:
    """Let a chain prefill one prompt and decode with all requests in flight.

    Args:
        model: unit and message times; its workload says how many requests there are.
        stages: the chain in order.

    Raises:
        InfeasibleError: two devices that must exchange messages are not connected.
    """
    route = _decode_route(model, stages)
    prefill = _run_prefill(model, stages)
    alone = _run_decode(route, requests=1, rounds=2)
    requests = _useful_requests(route, model.workload.requests_in_flight)
    together = _run_decode(route, requests=requests, rounds=2 * SETTLING_ROUNDS)
    period = _steady_period(together, last=route[-1], requests=requests)
    # Stages that read at once through one memory bus slow each other down, which the single visits do not show.
    period = max(period, *model.stages_bus_seconds(stages), 0.0)
    seconds_per_token = _round_seconds(alone, last=route[-1])
    batch = model.workload.batch_size
    return Simulation(
        time_to_first_token_seconds=max(event.end_seconds for event in prefill),
        seconds_per_token=seconds_per_token,
        step_period_seconds=period,
        tokens_per_second=batch / max(seconds_per_token, 1e-12),
        pipelined_tokens_per_second=batch / max(period, 1e-12),
        busy_shares=tuple(visit.seconds / max(period, 1e-12) for visit in route if visit.kind == "decode"),
        prefill_events=tuple(prefill),
        decode_events=tuple(together),
    )


def _decode_route(model: CostModel, stages: Sequence[StageRange]) -> list[_Visit]:
    """The stops of one decode step: stage, link, stage, ..., and the way back."""
    route: list[_Visit] = []
    for index, stage in enumerate(stages):
        seconds = sum(model.decode_seconds(unit, stage.device) for unit in stage.units(model.profile))
        route.append(_Visit("decode", stage.device, seconds))
        if index + 1 < len(stages):
            to = stages[index + 1].device
            hop = _connected(model, stage.device, to, model.decode_hop_seconds(stage.device, to))
            route.append(_Visit("hop", f"{stage.device} -> {to}", hop))
    last, first = stages[-1].device, stages[0].device
    back = _connected(model, last, first, model.return_hop_seconds(last, first))
    route.append(_Visit("return", f"{last} -> {first} (tokens)", back))
    return route


def _run_decode(route: Sequence[_Visit], *, requests: int, rounds: int) -> list[Event]:
    """Send `requests` batches round `route`, `rounds` times each; all stand at the first stage at time 0."""
    free_at = {visit.resource: 0.0 for visit in route}
    order = count()  # first come, first served among equals
    arrivals = [(0.0, next(order), request, 0) for request in range(requests)]
    events = []
    while arrivals:
        now, _order, request, position = heapq.heappop(arrivals)
        visit = route[position % len(route)]
        start = max(now, free_at[visit.resource])
        end = free_at[visit.resource] = start + visit.seconds
        events.append(Event(visit.kind, visit.resource, request, position // len(route), start, end))
        if position + 1 < rounds * len(route):
            heapq.heappush(arrivals, (end, next(order), request, position + 1))
    return events


def _useful_requests(route: Sequence[_Visit], requests: int) -> int:
    """Requests beyond those that keep the slowest resource busy only wait in line: leave them out."""
    slowest = max(visit.seconds for visit in route)
    if slowest <= 0:
        return 1
    return min(requests, math.ceil(sum(visit.seconds for visit in route) / slowest) + 1)


def _steady_period(events: Iterable[Event], *, last: _Visit, requests: int) -> float:
    """Time per step over the second half of the rounds, measured where steps leave the chain."""
    ends = [event.end_seconds for event in events if event.request == 0 and event.resource == last.resource]
    return (ends[-1] - ends[SETTLING_ROUNDS - 1]) / (SETTLING_ROUNDS * requests)


def _round_seconds(events: Iterable[Event], *, last: _Visit) -> float:
    ends = [event.end_seconds for event in events if event.resource == last.resource]
    return ends[-1] - ends[-2]


def _run_prefill(model: CostModel, stages: Sequence[StageRange]) -> list[Event]:
    """Send the chunks of one prompt through the chain; in one process nothing overlaps."""
    chunks = model.workload.prefill_chunks
    is_one_process = model.execution == "one_process"
    compute = [_chunk_seconds(model, stage) for stage in stages]
    events: list[Event] = []
    free_at = [0.0] * len(stages)
    link_free_at = [0.0] * len(stages)
    process_free_at = 0.0
    for chunk, (tokens, _past) in enumerate(chunks):
        now = process_free_at if is_one_process else 0.0
        for index, stage in enumerate(stages):
            if index:
                before = stages[index - 1].device
                hop = _connected(model, before, stage.device, model.prefill_hop_seconds(before, stage.device, tokens))
                start = max(now, link_free_at[index])
                now = link_free_at[index] = start + hop
                events.append(Event("hop", f"{before} -> {stage.device}", 0, chunk, start, now))
            start = max(now, free_at[index])
            now = free_at[index] = start + compute[index][chunk]
            events.append(Event("prefill", stage.device, 0, chunk, start, now))
        process_free_at = now
    return events


def _chunk_seconds(model: CostModel, stage: StageRange) -> list[float]:
    times = [model.prefill_seconds(unit, stage.device) for unit in stage.units(model.profile)]
    return [sum(unit[chunk] for unit in times) for chunk in range(len(model.workload.prefill_chunks))]


def _connected(model: CostModel, a: str, b: str, seconds: float) -> float:
    if math.isinf(seconds):
        raise InfeasibleError(model.topology.explain(a, b), code="E-LINK")
    return seconds
