"""What happens when requests share steps, as `llamarun serve` lets them: slots, and one decision after the other.

A request waits for a slot. Whoever drives the chain decides, whenever the first stage is free, what the next step is:
a chunk of the oldest prompt that is not read yet, or the newest tokens of those that have one. The two take turns
where there are both, after a chunk or two. As many steps as the chain has stages can be under way (one in one
process), and those who decode are shared out among so many. The rules are those of `runtime.engine`, and a test
compares both; requests are sequences of their own here, whatever the batch size of the plan.

Every stage and link works on one step at a time, first come, first served: an event per stop. So does the memory bus of
a host, where its bandwidth is stated and several CPU stages share it: a step asks it for the bytes of a stage when it
begins there, and leaves no earlier than the bus has carried them after all that it was asked for before. That comes to
the step period of a plan, max(slowest stage, bus), and is kind: a bus is never idle because a step computes meanwhile.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np

from planner.simulate.one_plan import Event
from planner.simulate.serving import Seconds, Serving, check_lengths, check_room
from planner.simulate.stops import Chain
from planner.timing.costs import CostModel
from plans.plan import Plan
from plans.workload import Request, may_read_on


def simulate_slots(plan: Plan, *, requests: Sequence[Request], slots: int, most_events: int = 0) -> Serving:
    """Let requests run through a plan's chain as `llamarun serve --slots` runs them.

    Args:
        plan: a checked plan.
        requests: in the order of their arrival; each is one sequence.
        slots: sequences in the chain at once.
        most_events: how many events to record, for a trace.

    Raises:
        UsageError: a request does not fit the plan's context, or there is none.
        InfeasibleError: so many slots do not fit the plan's devices, or two devices are not connected.
    """
    check_room(plan, -(-slots // plan.workload.batch_size))
    check_lengths(plan, requests)
    return _Run(plan, requests, slots, most_events).result()


@dataclass(slots=True, eq=False)
class Running:
    """A request that has a slot.

    Attributes:
        number: its place in the order of arrival.
        context: tokens at which decode is costed.
        chunks: of its prompt that were not sent: their tokens, and those before them.
        tokens_left: that did not come.
        is_ready: whether its newest token is back at the first stage.
        turn: orders those who decode by when they were last in a step.
        last_token: when its newest token came.
    """

    number: int
    context: int
    chunks: deque[tuple[int, int]]
    tokens_left: int
    is_ready: bool = False
    turn: int = -1
    last_token: float = 0.0


def next_members(running: Sequence[Running], *, read: Sequence[int], depth: int) -> list[Running]:
    """Return whose parts the next step has, as `runtime.engine.turns` chooses them; nobody's if all wait for tokens.

    Args:
        running: who has a slot, in the order in which they got it.
        read: tokens of the chunks that were sent since the last step of those who decode.
        depth: steps that can be under way at once.
    """
    reading = [sequence for sequence in running if sequence.chunks]
    decoding = [sequence for sequence in running if not sequence.chunks]
    ready = sorted((s for s in decoding if s.is_ready), key=lambda sequence: sequence.turn)
    if reading and (not ready or may_read_on(read, reading[0].chunks[0][0])):
        return reading[:1]
    return ready[: -(-len(decoding) // depth)]


@dataclass(slots=True, eq=False)
class _Step:
    """What goes through the chain together; the next stop of it."""

    members: list[Running]
    seconds: list[float]
    bus_seconds: list[float]
    is_chunk: bool
    gives_tokens: bool
    number: int
    stop: int = 0


@dataclass
class _Run:
    plan: Plan
    requests: Sequence[Request]
    num_slots: int
    most_events: int
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain_of = lru_cache(maxsize=None)(self._chain_of)
        self.decode_seconds = lru_cache(maxsize=None)(lambda rows, context: self.chain_of(rows).decode_seconds(context))
        self.decode_bus = lru_cache(maxsize=None)(lambda rows, context: self.chain_of(rows).decode_bus_seconds(context))
        self.stops = self.chain_of(1).stops
        self.depth = len(self.plan.stages) if self.plan.execution == "process_per_stage" else 1
        size = len(self.requests)
        self.admitted, self.first_token, self.finished = np.zeros(size), np.zeros(size), np.zeros(size)
        self.gaps: list[float] = []
        self.busy = dict.fromkeys((stop.resource for stop in self.stops), 0.0)
        self.free_at = dict.fromkeys(self.busy, 0.0)
        self.bus_free_at = {stop.bus: 0.0 for stop in self.stops if stop.bus is not None}
        self.heap: list[tuple[float, int, _Step | None]] = []
        self.order, self.sent = count(), count()
        self.running: list[Running] = []
        self.next_request = self.num_under_way = 0
        self.read: list[int] = []

    def _chain_of(self, rows: int) -> Chain:
        load = self.plan.workload.model_copy(update={"batch_size": rows})
        model = CostModel(self.plan.profile, workload=load, cluster=self.plan.cluster, execution=self.plan.execution)
        return Chain(model, stages=self.plan.ranges)

    def result(self) -> Serving:
        arrived = np.array([request.arrival_seconds for request in self.requests])
        for at in arrived.tolist():
            self._push(at, None)
        while self.heap:
            now, order, step = heapq.heappop(self.heap)
            if step is not None and step.stop < len(self.stops):
                self._arrive(step, now, order)
            elif step is not None:
                self._back(step, now)
            if not self.heap or self.heap[0][0] > now:  # all of a moment has happened
                self._drive(now)
        return Serving(
            self.num_slots,
            arrived,
            self.admitted,
            self.first_token,
            self.finished,
            _seconds(self.gaps),
            sum(request.new_tokens for request in self.requests),
            self.busy,
            tuple(self.events),
        )

    def _push(self, now: float, step: _Step | None) -> None:
        heapq.heappush(self.heap, (now, next(self.order), step))

    def _drive(self, now: float) -> None:
        """Admit who has come, and send the next step if there is one and the first stage is free."""
        self._admit(now)
        if now < self.free_at[self.stops[0].resource] or self.num_under_way >= self.depth:
            return
        members = next_members(self.running, read=self.read, depth=self.depth)
        if members:
            step = self._step(members)
            self.num_under_way += 1
            self._visit(step, now)
            self._push(self.free_at[self.stops[0].resource], None)

    def _admit(self, now: float) -> None:
        while self.next_request < len(self.requests) and len(self.running) < self.num_slots:
            request, number = self.requests[self.next_request], self.next_request
            if request.arrival_seconds > now:
                return
            lengths = {"prompt_tokens": request.prompt_tokens, "new_tokens": request.new_tokens}
            load = self.plan.workload.model_copy(update=lengths)
            chunks = deque(load.prefill_chunks)
            self.running.append(Running(number, load.decode_context_tokens, chunks, request.new_tokens))
            self.admitted[number] = now
            self.next_request += 1

    def _step(self, members: list[Running]) -> _Step:
        number, first = next(self.sent), members[0]
        if first.chunks:
            tokens, past = first.chunks.popleft()
            self.read.append(tokens)
            is_last = not first.chunks
            seconds = self.chain_of(1).chunk_seconds(tokens, past, is_last=is_last)
            bus = self.chain_of(1).chunk_bus_seconds(tokens, past, is_last=is_last)
            return _Step(members, seconds, bus, is_chunk=True, gives_tokens=is_last, number=number)
        self.read.clear()
        for place, sequence in enumerate(members):
            sequence.is_ready, sequence.turn = False, number * self.num_slots + place
        context = round(sum(sequence.context for sequence in members) / len(members))
        seconds = self.decode_seconds(len(members), context)
        bus = self.decode_bus(len(members), context)
        return _Step(members, seconds, bus, is_chunk=False, gives_tokens=True, number=number)

    def _arrive(self, step: _Step, now: float, order: int) -> None:
        """Let a step visit its next stop: a stage with a bus once it is free, since then the step asks the bus."""
        stop = self.stops[step.stop]
        if stop.bus is not None and self.free_at[stop.resource] > now:
            heapq.heappush(self.heap, (self.free_at[stop.resource], order, step))
        else:
            self._visit(step, now)

    def _visit(self, step: _Step, now: float) -> None:
        """Let a step stay at its next stop; tokens are there when it leaves the last stage."""
        stop, seconds = self.stops[step.stop], step.seconds[step.stop]
        start = max(now, self.free_at[stop.resource])
        if stop.bus is not None:
            carried = max(self.bus_free_at[stop.bus], start) + step.bus_seconds[step.stop]
            self.bus_free_at[stop.bus] = carried
            seconds = max(seconds, carried - start)
        end = self.free_at[stop.resource] = start + seconds
        self.busy[stop.resource] += seconds
        if seconds and len(self.events) < self.most_events:
            kind = "prefill" if step.is_chunk and stop.kind == "decode" else stop.kind
            self.events.append(Event(kind, stop.resource, step.members[0].number, step.number, start, end))
        if step.gives_tokens and step.stop == len(self.stops) - 2:
            for sequence in step.members:
                self._token(sequence, end)
        step.stop += 1
        self._push(end, step)

    def _token(self, sequence: Running, now: float) -> None:
        if sequence.tokens_left == self.requests[sequence.number].new_tokens:
            self.first_token[sequence.number] = now
        else:
            self.gaps.append(now - sequence.last_token)
        sequence.tokens_left -= 1
        sequence.last_token = now

    def _back(self, step: _Step, now: float) -> None:
        """Hand out what a step gave; who is done leaves."""
        self.num_under_way -= 1
        for sequence in step.members if step.gives_tokens else ():
            sequence.is_ready = True
            if not sequence.tokens_left:
                self.running.remove(sequence)
                self.finished[sequence.number] = now


def _seconds(values: Sequence[float]) -> Seconds:
    return np.array(values, dtype=np.float64)
