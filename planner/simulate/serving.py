"""What happens when requests arrive: a discrete-event simulation of chunked prefill and pipelined decode.

A request waits until fewer than the allowed number are in flight. Then its prompt enters the chain chunk by chunk - the
next one as soon as the first stage is done with the last (a process per stage), or when the chain is (one process) -
and every token but the first goes round the chain and back. Stages and links serve steps in the order of their arrival.
A request holds its place until the id of its last token is back at the first stage.

Unlike `planner.simulate.one_plan`, which lets every step happen at every stop and needs nothing else, this one is made
for many requests over long chains: one event per step (see `planner.simulate.tandem`). A test compares both.
"""

import heapq
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.simulate.one_plan import Event
from planner.simulate.stops import Chain
from planner.simulate.tandem import Tandem, Work
from planner.timing.costs import CostModel
from plans.errors import InfeasibleError, UsageError
from plans.plan import Plan
from plans.workload import Request

FINEST_TICK_SECONDS = 1e-12
_MOST_TICKS = 2**62
_ARRIVES, _LEAVES = -2, -1
"""Steps of a request that are no work: it asks for a place, and it gives its place up."""

Seconds = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Serving:
    """What happened to every request, in seconds from the start; requests are in the order of their arrival."""

    in_flight: int
    """How many requests could be under way at once."""
    arrived: Seconds
    admitted: Seconds
    first_token: Seconds
    finished: Seconds
    """When the last token's id was back at the first stage."""
    token_gaps: Seconds
    """Between a token and the next one of the same request; all requests, in the order of the tokens."""
    num_tokens: int
    """Of all sequences of all requests."""
    busy_seconds: dict[str, float]
    """How long each device and link was busy altogether, in the order of the chain."""
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Requests of one length: their chunks, and their decode step (taken in the middle of the answer)."""

    chunks: tuple[Work, ...]
    decode: Work
    new_tokens: int

    def work(self, step: int) -> Work:
        return self.chunks[step] if step < len(self.chunks) else self.decode

    @property
    def last_step(self) -> int:
        return len(self.chunks) + self.new_tokens - 2


def simulate_requests(
    plan: Plan, *, requests: Sequence[Request], in_flight: int | None = None, most_events: int = 0
) -> Serving:
    """Let requests run through a plan's chain.

    Args:
        plan: a checked plan.
        requests: in the order of their arrival; each stands for a batch of the plan's size.
        in_flight: requests in the chain at once; the plan's own number by default.
        most_events: how many events to record, for a trace.

    Raises:
        UsageError: a request does not fit the plan's context, or there is none.
        InfeasibleError: so many requests in flight do not fit the plan's devices, or two devices are not connected.
    """
    allowed = in_flight or plan.workload.requests_in_flight
    check_room(plan, allowed)
    check_lengths(plan, requests)
    return _Run(plan, requests, allowed, most_events).result()


def bus_limit(plan: Plan) -> float | None:
    """Return the tokens per second that the busiest memory bus carries, which `simulate_requests` does not count.

    Returns:
        None if no bus of the plan's hosts is known.
    """
    model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution)
    seconds = max(model.stages_bus_seconds(plan.ranges), default=0.0)
    return plan.workload.batch_size / seconds if seconds else None


def most_in_flight(plan: Plan) -> tuple[int, str]:
    """Return how many requests the plan's cut can hold at once, and the device that holds the fewest."""
    planned = plan.workload.requests_in_flight

    def room(stage_index: int) -> int:
        stage = plan.stages[stage_index]
        per_request = stage.kv_cache_bytes // planned
        rest = stage.budget_bytes - (stage.total_bytes - stage.kv_cache_bytes)
        return rest // per_request if per_request else 65536

    tightest = min(range(len(plan.stages)), key=room)
    return room(tightest), plan.stages[tightest].device


def check_room(plan: Plan, in_flight: int) -> None:
    """Require that the plan's devices have the caches of so many requests; errors as `simulate_requests`."""
    most, device = most_in_flight(plan)
    if in_flight > most:
        raise InfeasibleError(
            f"{device} holds the caches of {most} requests in this cut, not of {in_flight}",
            hint=f"lower --in-flight or --slots, or plan for it: llamaplan solve --requests-in-flight {in_flight}",
        )


def check_lengths(plan: Plan, requests: Sequence[Request]) -> None:
    """Require requests that fit the plan's context; errors as `simulate_requests`."""
    if not requests:
        raise UsageError("there is no request to simulate", expected="at least 1")
    context = plan.workload.context_tokens
    for number, request in enumerate(requests, start=1):
        if request.prompt_tokens + request.new_tokens > context:
            raise UsageError(
                f"request {number} has {request.prompt_tokens} + {request.new_tokens} tokens, the plan's context is "
                f"{context}",
                hint="shorten it, or plan for a larger --ctx-size",
            )


@dataclass
class _Run:
    plan: Plan
    requests: Sequence[Request]
    in_flight: int
    most_events: int
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.plan
        model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution)
        self.chain = Chain(model, stages=plan.ranges)
        self.tandem = Tandem([stop.resource for stop in self.chain.stops])
        self.is_pipelined = plan.execution == "process_per_stage"
        self.kind_of = lru_cache(maxsize=None)(self._kind_of)
        self.decode_work = lru_cache(maxsize=None)(self._decode_work)
        self.chunk_work = lru_cache(maxsize=None)(self._chunk_work)
        self.works: list[Work] = []
        self.tick = self._tick()
        self.kinds = [self.kind_of(r.prompt_tokens, r.new_tokens) for r in self.requests]
        size = len(self.requests)
        self.arrived = [round(request.arrival_seconds / self.tick) for request in self.requests]
        self.admitted, self.first_token, self.finished = [0] * size, [0] * size, [0] * size
        self.last_token = [0] * size
        self.token_gaps = array("q")
        self.heap: list[tuple[int, int, int, int, int]] = []
        self.order = count()
        self.free_places, self.next_waiting, self.num_waiting = self.in_flight, 0, 0

    def _tick(self) -> float:
        """The finest power of ten at which everything, one after the other, takes less than 2**62 ticks."""
        longest = {(r.prompt_tokens, r.new_tokens): r for r in self.requests}
        chunk, context = self.plan.workload.prefill_chunk_tokens, self.plan.workload.context_tokens
        a_step = sum(self.chain.decode_seconds(context))
        a_chunk = sum(self.chain.chunk_seconds(min(chunk, context), context - min(chunk, context), is_last=True))
        most = max(-(-p // chunk) * a_chunk + n * a_step for p, n in longest)
        total = self.requests[-1].arrival_seconds + most * len(self.requests)
        tick = FINEST_TICK_SECONDS
        while total > tick * _MOST_TICKS:
            tick *= 10
        return tick

    def _kind_of(self, prompt_tokens: int, new_tokens: int) -> _Kind:
        load = self.plan.workload.model_copy(update={"prompt_tokens": prompt_tokens, "new_tokens": new_tokens})
        steps = load.prefill_chunks
        chunks = tuple(self.chunk_work(tokens, past, tokens + past == prompt_tokens) for tokens, past in steps)
        return _Kind(chunks, self.decode_work(load.decode_context_tokens), new_tokens)

    def _decode_work(self, context: int) -> Work:
        return self._work(self.chain.decode_seconds(context))

    def _chunk_work(self, tokens: int, past: int, is_last: bool) -> Work:  # noqa: FBT001  # the cache wants positions
        return self._work(self.chain.chunk_seconds(tokens, past, is_last=is_last))

    def _work(self, seconds: Sequence[float]) -> Work:
        work = self.tandem.work([round(part / self.tick) for part in seconds])
        self.works.append(work)
        return work

    def result(self) -> Serving:
        self._push(self.arrived[0], 0, _ARRIVES, 0)
        while self.heap:
            now, _order, request, step, part = heapq.heappop(self.heap)
            if step >= 0:
                self._advance(now, request, step, part)
            elif step == _ARRIVES:
                self._arrive(now, request)
            else:
                self._leave(now)
        return Serving(
            self.in_flight,
            self._seconds(self.arrived),
            self._seconds(self.admitted),
            self._seconds(self.first_token),
            self._seconds(self.finished),
            np.frombuffer(self.token_gaps, dtype=np.int64).astype(np.float64) * self.tick,
            self.plan.workload.batch_size * sum(kind.new_tokens for kind in self.kinds),
            self._busy_seconds(),
            tuple(self.events),
        )

    def _push(self, now: int, request: int, step: int, part: int) -> None:
        heapq.heappush(self.heap, (now, next(self.order), request, step, part))

    def _arrive(self, now: int, request: int) -> None:
        if request + 1 < len(self.requests):
            self._push(self.arrived[request + 1], request + 1, _ARRIVES, 0)
        self.num_waiting += 1
        self._admit(now)

    def _leave(self, now: int) -> None:
        self.free_places += 1
        self._admit(now)

    def _admit(self, now: int) -> None:
        """Give a free place to whoever has waited longest."""
        if not (self.free_places and self.num_waiting):
            return
        request = self.next_waiting
        self.free_places, self.num_waiting, self.next_waiting = self.free_places - 1, self.num_waiting - 1, request + 1
        self.admitted[request] = now
        self._push(now, request, 0, 0)

    def _advance(self, now: int, request: int, step: int, part: int) -> None:
        """Let a step pass one part of the chain, and put what follows from it on the list."""
        kind = self.kinds[request]
        work = kind.work(step)
        left = self.tandem.enter(work, part=part, now=now)
        if len(self.events) < self.most_events:
            self._record(work, request, step, part, is_prefill=step < len(kind.chunks))
        is_chunk = step + 1 < len(kind.chunks)
        if part == 0:
            work.count += 1
            if is_chunk and self.is_pipelined:
                self._push(self.tandem.left_first(), request, step + 1, 0)
        if part + 1 < len(self.tandem.parts):
            self._push(left, request, step, part + 1)
        elif not is_chunk:
            self._token(request, step, at=self._end_of_chain(part, now), back=left)
        elif not self.is_pipelined:
            self._push(left, request, step + 1, 0)

    def _end_of_chain(self, part: int, now: int) -> int:
        """When the step left the last stage; the way back, which comes after, may be a part of its own."""
        left = self.tandem.left(part)
        return int(left[-2]) if len(left) > 1 else now

    def _token(self, request: int, step: int, *, at: int, back: int) -> None:
        kind = self.kinds[request]
        if step + 1 == len(kind.chunks):
            self.first_token[request] = at
        else:
            self.token_gaps.append(at - self.last_token[request])
        self.last_token[request] = at
        if step < kind.last_step:
            self._push(back, request, step + 1, 0)
            return
        self.finished[request] = back
        self._push(back, request, _LEAVES, 0)

    def _record(self, work: Work, request: int, step: int, part: int, *, is_prefill: bool) -> None:
        span = self.tandem.parts[part]
        number = step if is_prefill else step - len(self.kinds[request].chunks)
        for index, end in zip(range(span.start, span.end), self.tandem.left(part), strict=True):
            stop, ticks = self.chain.stops[index], int(work.ticks[index])
            kind = "prefill" if is_prefill and stop.kind == "decode" else stop.kind
            if ticks:
                start = (int(end) - ticks) * self.tick
                self.events.append(Event(kind, stop.resource, request, number, start, int(end) * self.tick))

    def _seconds(self, ticks: Sequence[int]) -> Seconds:
        return np.array(ticks, dtype=np.float64) * self.tick

    def _busy_seconds(self) -> dict[str, float]:
        by_stop = sum((work.ticks * work.count for work in self.works), np.zeros(len(self.chain.stops), dtype=np.int64))
        busy = dict.fromkeys((stop.resource for stop in self.chain.stops), 0.0)
        for stop, ticks in zip(self.chain.stops, by_stop, strict=True):
            busy[stop.resource] += int(ticks) * self.tick
        return busy


Process = Literal["poisson", "uniform"]


def make_requests(
    count: int, *, rate: float | None, process: Process, prompt_tokens: int, new_tokens: int, seed: int
) -> tuple[Request, ...]:
    """Return `count` requests of one length.

    Args:
        rate: requests per second; None lets all arrive at once.
        process: `poisson` draws independent exponential gaps, `uniform` spaces them evenly.
        prompt_tokens, new_tokens: of every request.
        seed: of the gaps.
    """
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        requests.append(Request(arrival_seconds=now, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
        if rate is not None:
            now += -math.log(1.0 - rng.random()) / rate if process == "poisson" else 1.0 / rate
    return tuple(requests)
