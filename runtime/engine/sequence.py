"""One request on its way: what of it is computed next, and what became of what came back."""

import time
from dataclasses import dataclass, field

from plans.errors import IntegrityError
from runtime.engine.counters import Totals
from runtime.engine.events import Done, OnEvent, PromptRead, Token, Usage
from runtime.engine.slots import Slot
from runtime.generate.request import Request, make_writer
from runtime.generate.text import Decode
from runtime.generate.writer import SequenceWriter
from runtime.steps.parts import PROMPT, TOKEN, Answer, Opening, Part, opening_of


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    Attributes:
        request: what was asked.
        room: new tokens at most.
        on_event: told what becomes of it.
        reuse_key: only caches of requests with the same key are taken over, and by them; None for none.
        number: on all stages; another one after a restart.
        slot: where its cache lies.
        writer: what was made of the tokens so far.
        token_ids: prompt and new tokens.
        position: tokens sent.
        num_cached: prompt tokens that were in a cache already.
        is_cancelled: whether nobody waits for it any more.
        turn: when it was last in a decode step; see `runtime.engine.turns`.
    """

    request: Request
    room: int
    on_event: OnEvent
    reuse_key: str | None
    decode: Decode | None
    number: int = -1
    slot: Slot | None = None
    token_ids: list[int] = field(default_factory=list)
    position: int = 0
    num_cached: int = 0
    is_cancelled: bool = False
    turn: int = -1
    submitted: float = field(default_factory=time.perf_counter)
    stepped: float = 0.0
    writer: SequenceWriter = field(init=False)
    _num_told: int = 0
    _pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.writer = make_writer(
            self.request,
            place=0,
            room=self.room,
            decode=self.decode,
            on_text=lambda _place, piece: self._pieces.append(piece),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens it may come to."""
        return len(self.request.prompt_ids) + self.room

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt has not been sent."""
        return self.position < len(self.request.prompt_ids)

    @property
    def num_next_tokens(self) -> int:
        """Tokens of the next part.

        Prompts are cut at multiples of the chunk from their own beginning: where they are cut, and so how sums are
        rounded, does not depend on who else is there.
        """
        if not self.is_reading:
            return 1
        chunk = self.request.limits.prefill_chunk_tokens or self._num_prompt_tokens
        return min(chunk - self.position % chunk, self._num_prompt_tokens - self.position)

    @property
    def is_ready(self) -> bool:
        """Whether the next part can be sent without waiting for an answer."""
        return self.position < len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is to come."""
        return self.writer.is_finished and not (self.request.tells_prompt and self._num_told < self._num_prompt_tokens)

    @property
    def _num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    def opening(self, *, num_slots: int, capacity: int) -> Opening:
        """Return what the stages have to know before its first step."""
        assert self.slot is not None
        return opening_of(
            self.request,
            sequence=self.number,
            slot=self.slot.number,
            keeps_tokens=self.position,
            num_tokens=self.num_tokens,
            num_slots=num_slots,
            capacity=capacity,
        )

    def next_part(self, *, rope_switch: int | None) -> Part:
        """Return what is sent next, and count it as sent."""
        start, prompt = self.position, self._num_prompt_tokens
        end = start + self.num_next_tokens
        if rope_switch is not None and start <= rope_switch < end:
            start = 0
        tells = PROMPT if self.request.tells_prompt and end <= prompt else 0
        self.position = end
        return Part(self.number, start, end - start, tells + (TOKEN if end >= prompt and self.room else 0))

    def take(self, answer: Answer, totals: Totals) -> None:
        """Take what came back for a part, and tell of it.

        Raises:
            IntegrityError: a repeated step gave another token than the first time.
        """
        if self.request.tells_prompt and self._num_told < answer.part.end <= self._num_prompt_tokens:
            self._num_told = answer.part.end
            self.on_event(PromptRead(answer.prompt))
        if answer.token is None:
            return
        index, known = answer.part.end - self._num_prompt_tokens, self.writer.token_ids
        if index < len(known):
            self._compare(index, answer.token)
            return
        self._note_time(totals)
        self.writer.add(answer.token)
        self.token_ids.append(answer.token)
        self.on_event(Token(answer.token, self._take_text(), answer.likely))

    def end(self) -> Done:
        """Return the last event; what is not finished ends where it is."""
        self.writer.interrupt()
        assert self.writer.finish_reason is not None
        usage = Usage(self._num_prompt_tokens, len(self.writer.token_ids), self.num_cached)
        return Done(self.writer.finish_reason, usage, self._take_text())

    def _take_text(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _compare(self, index: int, token: int) -> None:
        before = self.writer.token_ids[index]
        if token != before:
            raise IntegrityError(
                f"step {index} gave token {token} after the restart, {before} before",
                hint="the machines do not compute the same; run without --restart",
                code="E-REPLAY",
            )

    def _note_time(self, totals: Totals) -> None:
        now = time.perf_counter()
        if self.writer.token_ids:
            totals.gaps.add(now - self.stepped)
        else:
            totals.first_token.add(now - self.submitted)
        self.stepped = now
        totals.num_new_tokens += 1
