"""One group of sequences on its way: which columns are computed next, and what became of the tokens that came back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from plans.errors import IntegrityError
from runtime.distributed.control.messages import Open
from runtime.distributed.slots import drawing_of
from runtime.generate.limits import check_prompts
from runtime.generate.loop import Generation, Request, make_writer
from runtime.generate.text import Decode
from runtime.generate.token_chooser import depends_on_tokens
from runtime.generate.tokens import TokenBatch
from runtime.generate.writer import OnText, SequenceWriter


@dataclass(frozen=True, slots=True)
class Span:
    """Columns of one step; tokens are chosen after it if it ends with the newest column."""

    start: int
    end: int
    needs_tokens: bool


@dataclass(slots=True)
class HeldCache:
    """A cache that lies on all stages.

    Attributes:
        group: whose it is; None before the first step.
        columns: tokens it holds.
        keeps: tokens of it that the next run continues from.
        spans: the steps that made it, so that it can be made again.
    """

    group: int | None = None
    columns: int = 0
    keeps: int = 0
    spans: tuple[Span, ...] = ()

    def get_seq_length(self) -> int:
        """Return the tokens that the next run starts from."""
        return self.keeps


@dataclass(slots=True)
class Flow:
    """The state of one group.

    Attributes:
        requests: one per sequence.
        rooms: new tokens each may get.
        writers: what was made of the tokens so far.
        batch: the token ids, padded on the left.
        num_prompt_columns: columns of the prompts.
        num_new_columns: room for new tokens.
        num_cached: prompt tokens that were in the cache already.
        chunk_tokens: prompt columns per step.
        cache: what an earlier run left, if this one continues it.
        rope_switch: columns past which the rotary factors are others, so that what a cache holds has to be computed
            again; see `runtime.reading.families.rope_switch`.
        group: number on all stages; another one after a restart.
        step: steps sent so far under this number.
        column: columns sent so far.
        spans: steps since the cache was empty.
        replay: steps to send again after a restart, before anything new.
    """

    requests: Sequence[Request]
    rooms: Sequence[int]
    writers: list[SequenceWriter]
    batch: TokenBatch
    num_prompt_columns: int
    num_new_columns: int
    num_cached: int
    chunk_tokens: int
    cache: HeldCache
    rope_switch: int | None = None
    group: int = -1
    step: int = 0
    column: int = 0
    spans: list[Span] = field(default_factory=list)
    replay: list[Span] = field(default_factory=list)
    replayed_columns: list[int] = field(default_factory=list)
    started: float = 0.0
    stepped: float = 0.0
    first_token_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is."""
        return all(writer.is_finished for writer in self.writers)

    @property
    def has_more_prompt(self) -> bool:
        """Whether the next step can be sent without waiting for tokens."""
        return bool(self.replay) or self.column < self.batch.length

    def opening(self, *, for_last_stage: bool) -> Open:
        """Return what a stage has to know before the first step."""
        drawings = tuple(map(drawing_of, self.requests, self.rooms))
        needs_prompts = for_last_stage and any(depends_on_tokens(request.sampling) for request in self.requests)
        return Open(
            group=self.group,
            lengths=tuple(len(request.prompt_ids) for request in self.requests),
            num_new_tokens=self.num_new_columns,
            drawings=drawings if for_last_stage else (),
            prompts=tuple(tuple(r.prompt_ids) for r in self.requests) if needs_prompts else (),
            continues=self.cache.group,
            keeps_tokens=self.cache.keeps if self.cache.group is not None else 0,
        )

    def next_span(self) -> Span:
        """Return the next step and count it as sent."""
        if self.replay:
            span = self.replay.pop(0)
        else:
            end = min(self.column + self.chunk_tokens, self.batch.length)
            switches = self.rope_switch is not None and self.column <= self.rope_switch < end
            span = Span(0 if switches else self.column, end, end == self.batch.length)
            self.spans.append(span)
        self.column, self.step = span.end, self.step + 1
        if span.needs_tokens and span.end < self.batch.length:
            self.replayed_columns.append(span.end)
        return span

    def take(self, tokens: Sequence[int]) -> None:
        """Take the tokens that the last stage chose.

        Raises:
            IntegrityError: a repeated step gave other tokens than the first time.
        """
        if self.replayed_columns:
            self._compare(self.replayed_columns.pop(0), tokens)
            return
        pad = self.batch.pad_token_id
        kept = [pad if w.is_finished else token for w, token in zip(self.writers, tokens, strict=True)]
        for writer, token in zip(self.writers, kept, strict=True):
            if not writer.is_finished:
                writer.add(token)
        self.batch.append(kept)
        self._note_time()

    def start_over(self) -> None:
        """Prepare to send every step again, under another number, to stages that have forgotten all of them."""
        self.step = self.column = 0
        self.cache = HeldCache()
        self.replay, self.replayed_columns = list(self.spans), []

    def interrupt(self) -> None:
        """End every sequence where it is."""
        for writer in self.writers:
            writer.interrupt()

    def result(self) -> Generation:
        """Return what was generated; stage times are left out."""
        return Generation(
            sequences=tuple(writer.result() for writer in self.writers),
            num_prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            num_cached_tokens=self.num_cached,
            time_to_first_token_seconds=self.first_token_seconds,
            step_seconds=tuple(self.step_seconds),
            prefill_stages=(),
            decode_stages=(),
            cache=HeldCache(self.group, self.column, self.column, tuple(self.spans)),
        )

    def _compare(self, column: int, tokens: Sequence[int]) -> None:
        for row, (writer, token) in enumerate(zip(self.writers, tokens, strict=True)):
            index = column - self.num_prompt_columns
            if index < len(writer.token_ids) and writer.token_ids[index] != token:
                raise IntegrityError(
                    f"step {index} of sequence {row} gave token {token} after the restart, "
                    f"{writer.token_ids[index]} before",
                    hint="the machines do not compute the same; run without --restart",
                    code="E-REPLAY",
                )

    def _note_time(self) -> None:
        now = time.perf_counter()
        if self.batch.length == self.num_prompt_columns + 1:
            self.first_token_seconds = now - self.started
        else:
            self.step_seconds.append(now - self.stepped)
        self.stepped = now


def make_flow(
    requests: Sequence[Request],
    *,
    vocab_size: int,
    pad_token_id: int,
    decode: Decode | None,
    on_text: OnText | None,
    cache: HeldCache | None = None,
    rope_switch: int | None = None,
) -> Flow:
    """Check the requests of one group and prepare them; errors as `runtime.generate.loop.generate_requests`."""
    prompts = [request.prompt_ids for request in requests]
    limits = [request.limits for request in requests]
    rooms = check_prompts(prompts, limits=limits, vocab_size=vocab_size, has_decode=decode is not None)
    batch = TokenBatch(prompts, num_new_tokens=max(rooms), pad_token_id=pad_token_id)
    writers = [
        make_writer(request, place=place, room=room, decode=decode, on_text=on_text)
        for place, (request, room) in enumerate(zip(requests, rooms, strict=True))
    ]
    held = cache or HeldCache()
    kept = [Span(s.start, min(s.end, held.keeps), needs_tokens=False) for s in held.spans if s.start < held.keeps]
    return Flow(
        requests=requests,
        rooms=rooms,
        writers=writers,
        batch=batch,
        num_prompt_columns=batch.length,
        num_new_columns=max(rooms),
        num_cached=held.keeps,
        chunk_tokens=limits[0].prefill_chunk_tokens or batch.length,
        cache=held,
        rope_switch=rope_switch,
        column=held.keeps,
        spans=kept,
    )


class KeptColumns:
    """The token ids of a cache that lies on all stages.

    Args:
        forget: gives a cache up on every stage.
        can_be_cut: whether the end of a cache can be taken back; a sliding window that has moved on cannot.
    """

    def __init__(self, forget: Callable[[HeldCache], None], *, can_be_cut: bool) -> None:
        self._forget = forget
        self._can_be_cut = can_be_cut
        self._token_ids: list[int] = []
        self._cache = HeldCache()

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds."""
        return len(self._token_ids)

    def reset(self) -> None:
        """Forget everything, for example after a run that did not end."""
        self._forget(self._cache)
        self._token_ids = []
        self._cache = HeldCache()

    def match(self, prompt_ids: Sequence[int]) -> HeldCache:
        """Return the cache cut back to the longest beginning it shares with a prompt, the last token left out."""
        pairs = zip(self._token_ids, prompt_ids[:-1], strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if num_shared < len(self._token_ids) and not self._can_be_cut:
            self.reset()
            num_shared = 0
        del self._token_ids[num_shared:]
        self._cache.keeps = num_shared
        return self._cache

    def keep(self, token_ids: Sequence[int], cache: HeldCache) -> None:
        """Keep a cache after a run; `token_ids` are the prompt and what followed."""
        self._cache = cache
        self._token_ids = list(token_ids[: cache.columns])
