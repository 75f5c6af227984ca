"""The one loop: whoever waits is admitted, a step is computed, and what comes back is handed out.

One thread owns the model: it calls `run`. Any other may submit and cancel.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable

from plans.errors import IntegrityError, LlamaplanError, MachineError
from runtime.engine.budget import Budget
from runtime.engine.counters import Counters, Totals
from runtime.engine.events import Done, Failed, OnEvent
from runtime.engine.model import Model
from runtime.engine.sequence import Sequence
from runtime.engine.slots import Slot, Slots
from runtime.engine.turns import Turns
from runtime.generate.limits import check_prompts
from runtime.generate.request import Request
from runtime.generate.text import Decode
from runtime.reading.capacity import memory_faults
from runtime.steps.parts import Answer, Forgotten


class Ticket:
    """A request that was taken."""

    def __init__(self, engine: "Engine", sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence

    def cancel(self) -> None:
        """Give it up: its slot is free after the step that is being computed, and its last event is `interrupted`."""
        self._engine.cancel(self._sequence)


class Engine:
    """Runs requests on a loaded model, many of them at once.

    Args:
        model: a session; nothing else may use it while the engine does.
        num_slots: requests that run at once.
        cache_tokens: the longest any of them may become; None for the whole context.
        budget: cache bytes for them; None for as many tokens in every slot.
        queue_limit: requests that may wait for a slot.
        decode: token ids -> text; None for the model's own.
        reads_first: whether all prompts are read before anybody decodes; else the two take turns.

    Attributes:
        fault: what ended it; None while all is well.

    Example:
        >>> engine = Engine(session, num_slots=4)  # doctest: +SKIP
        >>> engine.submit(request, on_event=print)  # doctest: +SKIP
        >>> engine.run_all()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int = 1,
        cache_tokens: int | None = None,
        budget: Budget | None = None,
        queue_limit: int | None = None,
        decode: Decode | None = None,
        reads_first: bool = False,
    ) -> None:
        self._vocab_size = model.prepared.vocab_size
        self._decode = decode or model.prepared.own_decode
        self._budget = budget or Budget.of(model.prepared, num_sequences=num_slots, cache_tokens=cache_tokens)
        self._queue_limit = queue_limit
        self._capacity = min(cache_tokens or self._budget.longest, self._budget.longest)
        self._steps = model.new_steps()
        self._num_slots = min(num_slots, self._steps.most_slots or num_slots)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._turns = Turns(depth=self._steps.depth, reads_first=reads_first)
        self._slots = Slots(self._num_slots, can_be_cut=self._steps.can_be_cut)
        self._changed = threading.Condition()
        self._is_draining = self._is_stopping = False
        self._totals = Totals()
        self.fault: LlamaplanError | None = None

    def submit(self, request: Request, *, on_event: OnEvent, reuse_key: str | None = None) -> Ticket:
        """Take a request, from any thread.

        Args:
            request: what to continue.
            on_event: told what becomes of it, in the engine's thread; the last event is `Done` or `Failed`.
            reuse_key: where an earlier request with the same key began with the same tokens, these are not read again;
                None keeps nothing and takes nothing over.

        Raises:
            UsageError: it can never fit; with both numbers.
            MachineError: too many wait already (E-QUEUE), or the engine is ending (E-DRAINING).
            LlamaplanError: the fault that ended the engine.
        """
        [room] = check_prompts(
            [request.prompt_ids],
            limits=[request.limits],
            vocab_size=self._vocab_size,
            has_decode=self._decode is not None,
        )
        sequence = Sequence(request, room, on_event, reuse_key, self._decode)
        self._budget.check(sequence.num_tokens)
        with self._changed:
            self._require_open()
            self._waiting.append(sequence)
        self._steps.wake()
        return Ticket(self, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Give a request up; see `Ticket.cancel`."""
        sequence.is_cancelled = True
        self._steps.wake()

    def run(self) -> None:
        """Serve until `stop`, or until everything is done after `drain`.

        Raises:
            LlamaplanError: the fault that ended it; every request has been told.
        """
        self._serve(until=lambda: self._is_draining and self.is_idle)

    def run_all(self) -> None:
        """Serve until nothing is left to do; errors as `run`."""
        self._serve(until=lambda: self.is_idle)

    def step(self) -> None:
        """Send one step, if there is anything to do, and hand out what has come back; errors as `run`."""
        turns = iter([False])
        self._serve(until=lambda: self.is_idle or next(turns, True))

    def drain(self, seconds: float) -> None:
        """Refuse what is new, let what runs and waits end, and stop after so many seconds at the latest."""
        with self._changed:
            self._is_draining = True
            self._steps.wake()
            self._changed.wait_for(lambda: self.is_idle or self.fault is not None, timeout=seconds)
        self.stop()

    def stop(self) -> None:
        """Let `run` return after the step that is being computed; whatever is not done ends as `interrupted`."""
        self._is_draining = self._is_stopping = True
        self._steps.wake()

    def abandon(self) -> None:
        """Give up every request, without a word to anybody, and all caches; after an interruption."""
        with self._changed:
            running = list(self._running.values())
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()
        for sequence in running:
            assert sequence.slot is not None
            self._slots.give_back(sequence.slot)
        for slot in self._slots:
            if slot.sequence is not None:
                self._empty(slot)

    @property
    def is_ending(self) -> bool:
        """Whether nothing new is taken."""
        return self._is_draining

    @property
    def counters(self) -> Counters:
        """What it does now and has done; from any thread."""
        with self._changed:
            running, kept = list(self._running.values()), sum(self._slots.lengths)
            return Counters(
                num_running=len(running),
                num_waiting=len(self._waiting),
                num_slots=self._num_slots,
                kv_tokens_used=sum(sequence.position for sequence in running) + kept,
                kv_tokens_reserved=sum(sequence.num_tokens for sequence in running),
                totals=self._totals,
            )

    @property
    def is_reading(self) -> bool:
        """Whether somebody waits for a first token."""
        return bool(self._waiting) or any(not s.writer.token_ids for s in self._running.values())

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    def _require_open(self) -> None:
        if self.fault is not None:
            raise self.fault
        if self._is_draining:
            raise MachineError("the engine takes nothing new: it is ending", code="E-DRAINING")
        if self._queue_limit is not None and len(self._waiting) >= self._queue_limit:
            raise MachineError(
                f"{len(self._waiting)} requests are waiting already",
                expected=f"{self._queue_limit} at most",
                hint="try again later",
                code="E-QUEUE",
            )

    def _serve(self, *, until: Callable[[], bool]) -> None:
        try:
            with memory_faults("computing a step"):
                self._prepare()
                while not self._is_stopping and not until():
                    self._turn()
                    self._prepare()
        except BaseException as error:
            self._fail(error)
            raise
        if self._is_stopping:
            self._end_all()

    def _prepare(self) -> None:
        self._end_cancelled()
        self._admit()

    def _turn(self) -> None:
        chosen = self._turns.next(self._running.values()) if self._steps.has_room else []
        if chosen:
            parts = [sequence.next_part(rope_switch=self._steps.rope_switch) for sequence in chosen]
            pieces = [s.token_ids[part.start : part.end] for s, part in zip(chosen, parts, strict=True)]
            self._steps.send(parts, list(itertools.chain.from_iterable(pieces)))
        try:
            answers = self._steps.take(waits=not chosen)
        except Forgotten:
            self._start_over()
            return
        for answer in answers or ():
            sequence = self._running.get(answer.part.sequence)
            if sequence is not None:  # else it was cancelled
                self._hand_out(sequence, answer)

    def _hand_out(self, sequence: Sequence, answer: Answer) -> None:
        error: LlamaplanError | None = answer.error
        if answer.part.fault:
            step = max(0, answer.part.end - len(sequence.request.prompt_ids))
            error = self._steps.explain(answer.part, sequence.token_ids[: answer.part.end], step=step)
        try:
            if error is None:
                sequence.take(answer, self._totals)
        except IntegrityError as mismatch:
            error = mismatch
        if error is not None:
            self._end(sequence, Failed(error))
        elif sequence.is_finished:
            self._end(sequence, sequence.end())

    def _admit(self) -> None:
        """Give free slots to whoever has waited longest; nobody overtakes."""
        while self._waiting and len(self._slots):
            sequence = self._waiting[0]
            if sequence.is_finished:  # nothing was asked for
                with self._changed:
                    self._waiting.popleft()
                    self._changed.notify_all()
                self._tell(sequence, sequence.end())
                continue
            needed = [s.num_tokens for s in (*self._running.values(), sequence)]
            if not self._budget.has_room(needed):
                return
            reuse_key = None if sequence.request.tells_prompt else sequence.reuse_key
            slot, length = self._slots.best(sequence.request.prompt_ids, reuse_key=reuse_key)
            with self._changed:
                self._waiting.popleft()
                self._slots.take(slot)
                sequence.slot = slot
                self._number(sequence)
            for other in self._slots.kept():
                if not self._budget.has_room([*needed, *self._slots.lengths]):
                    self._empty(other)
            sequence.position = sequence.num_cached = length
            self._totals.num_prompt_tokens += len(sequence.request.prompt_ids)
            self._totals.num_cached_tokens += length
            self._open(sequence)

    def _number(self, sequence: Sequence) -> None:
        sequence.number = next(self._steps.numbers)
        self._running[sequence.number] = sequence

    def _open(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        sequence.slot.sequence = sequence.number
        self._steps.open(sequence.opening(num_slots=self._num_slots, capacity=self._capacity))

    def _empty(self, slot: Slot) -> None:
        assert slot.sequence is not None
        self._steps.close(slot.sequence, slot=slot.number, keeps=False)
        slot.token_ids = []

    def _end(self, sequence: Sequence, event: Done | Failed) -> None:
        """Free the slot of a sequence, tell it, and keep its cache if somebody may go on from there."""
        slot = sequence.slot
        assert slot is not None
        keeps = isinstance(event, Done) and sequence.reuse_key is not None
        slot.token_ids = sequence.token_ids[: sequence.position] if keeps else []
        slot.reuse_key = sequence.reuse_key
        self._steps.close(sequence.number, slot=slot.number, keeps=keeps)
        with self._changed:
            del self._running[sequence.number]
            self._slots.give_back(slot)
            self._changed.notify_all()
        self._tell(sequence, event)

    def _tell(self, sequence: Sequence, event: Done | Failed) -> None:
        self._totals.endings[event.finish_reason if isinstance(event, Done) else "failed"] += 1
        sequence.on_event(event)

    def _end_cancelled(self) -> None:
        for sequence in [s for s in self._running.values() if s.is_cancelled]:
            self._end(sequence, sequence.end())
        with self._changed:
            gone = [s for s in self._waiting if s.is_cancelled]
            self._waiting = deque(s for s in self._waiting if not s.is_cancelled) if gone else self._waiting
        for sequence in gone:
            self._tell(sequence, sequence.end())

    def _end_all(self) -> None:
        """End everybody where they are."""
        with self._changed:
            everybody = [*self._running.values(), *self._waiting]
        for sequence in everybody:
            sequence.is_cancelled = True
        self._end_cancelled()

    def _start_over(self) -> None:
        """Send everything again that the sequences consist of, to stages that have forgotten it.

        The same steps over the same tokens give the same caches, and the same draws; tokens that come back a second
        time are only compared.
        """
        for slot in self._slots.kept():
            slot.token_ids = []
        with self._changed:
            everybody = list(self._running.values())
            self._running.clear()
            for sequence in everybody:
                self._number(sequence)
        for sequence in everybody:
            sequence.position = 0
            self._open(sequence)

    def _fail(self, error: BaseException) -> None:
        """Give everything up, and tell everybody; an interruption by a person is no fault."""
        everybody = [*self._running.values(), *self._waiting]
        self.abandon()
        if isinstance(error, Exception):
            known = error if isinstance(error, LlamaplanError) else None
            self.fault = known or LlamaplanError(f"{type(error).__name__}: {error}")
            with self._changed:
                everybody += self._waiting
                self._waiting.clear()
                self._changed.notify_all()
            for sequence in everybody:
                self._tell(sequence, Failed(self.fault))
