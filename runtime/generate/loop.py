"""The commands' own generation loop: `prefill`, then `decode_one_token` until every sequence is finished.

It hands the chain exactly what `generate()` would, through the model's own `prepare_inputs_for_generation`, so logits
are the same. On top of that it keeps one random generator per sequence, streams text, and measures.

Shapes: B sequences, T tokens so far (padding included), V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from runtime.generate.clock import cache_clock, stage_clock
from runtime.generate.limits import Limits, check_cached, check_prompts
from runtime.generate.numerics import require_finite
from runtime.generate.rules import Ending
from runtime.generate.sampling import Sampling
from runtime.generate.text import Decode
from runtime.generate.token_chooser import TokenChooser
from runtime.generate.tokens import TokenBatch, padding_token
from runtime.generate.writer import GeneratedSequence, OnText, SequenceWriter
from runtime.reading.devices import one_thread
from runtime.stage_time import OnStep, StageTime, StepTrace, since
from runtime.stages.chain import Chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt_ids: token ids, not empty.
        sampling: how its tokens are chosen.
        limits: when it stops. Of a batch, the first one's `prefill_chunk_tokens` holds for all.
        sequence_index: decides, with the seed, its random draws; its place in a batch does not.
        num_top: how many likeliest tokens are told beside the chosen one's likelihood; None for neither.
        tells_prompt: whether the same is told for the tokens of the prompt.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    limits: Limits
    sequence_index: int = 0
    num_top: int | None = None
    tells_prompt: bool = False

    def ending(self, room: int) -> Ending:
        """Return how it may end if it gets `room` new tokens."""
        return Ending(max_length=len(self.prompt_ids) + room, eos_token_ids=tuple(sorted(self.limits.eos_token_ids)))


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated and how long it took. Seconds are wall-clock seconds."""

    sequences: tuple[GeneratedSequence, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were in the cache already and were not read again."""
    time_to_first_token_seconds: float
    step_seconds: tuple[float, ...]
    """One entry per decode step after the first token: forward, choice of the token, and text."""
    prefill_stages: tuple[StageTime, ...]
    decode_stages: tuple[StageTime, ...]
    """Per stage; empty when stage times were not asked for."""
    cache: Any
    """Holds everything but the last new token of each sequence; a `Cache`, or what keeps one in other processes."""

    @property
    def num_new_tokens(self) -> int:
        """New tokens of all sequences together."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first of each sequence per second of decoding; 0 when there were none."""
        seconds = sum(self.step_seconds)
        return (self.num_new_tokens - len(self.sequences)) / seconds if seconds else 0.0


@dataclass(slots=True)
class Decoding:
    """The state of a running generation: tokens and their cache. Step 0 is the prompt."""

    batch: TokenBatch
    cache: Cache
    step: int = 0


@dataclass(slots=True)
class _Timing:
    time_to_first_token_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    prefill_stages: tuple[StageTime, ...] = ()
    decode_stages: tuple[StageTime, ...] = ()

    def add(self, seconds: float, *, is_first: bool) -> None:
        if is_first:
            self.time_to_first_token_seconds = seconds
        else:
            self.step_seconds.append(seconds)


def prefill(chain: Chain, state: Decoding, *, chunk_tokens: int | None = None) -> torch.Tensor:
    """Read the part of the prompt that is not in the cache yet.

    Returns:
        fp32 logits [B, V] of the last position, on the CPU.
    """
    batch = state.batch
    past = int(state.cache.get_seq_length())
    size = chunk_tokens or batch.length
    for start in range(past, batch.length, size):
        end = min(start + size, batch.length)
        logits = _forward(chain, state, start=start, end=end)
    return logits


def decode_one_token(chain: Chain, state: Decoding) -> torch.Tensor:
    """Run the newest token of every sequence; returns logits as `prefill` does."""
    return _forward(chain, state, start=state.batch.length - 1, end=state.batch.length)


def generate(
    chain: Chain,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    limits: Limits,
    decode: Decode | None = None,
    on_text: OnText | None = None,
    cache: Cache | None = None,
    measure_stages: bool = False,
) -> Generation:
    """Continue every prompt with the same settings; arguments and errors as `generate_requests`."""
    requests = [
        Request(prompt_ids=prompt, sampling=sampling, limits=limits, sequence_index=index)
        for index, prompt in enumerate(prompts)
    ]
    return generate_requests(
        chain, requests, decode=decode, on_text=on_text, cache=cache, measure_stages=measure_stages
    )


def generate_requests(
    chain: Chain,
    requests: Sequence[Request],
    *,
    decode: Decode | None = None,
    on_text: OnText | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    cache: Cache | None = None,
    measure_stages: bool = False,
) -> Generation:
    """Continue every request; several are padded on the left and run as one batch.

    Args:
        chain: the model.
        requests: prompts with their settings.
        decode: token ids -> text; needed for text, streaming and stop strings.
        on_text: receives the place in `requests` and text as soon as it is certain, whole characters only.
        on_step: told what each step did.
        should_stop: asked after every step; once true, unfinished sequences end as `interrupted`.
        cache: cache that already holds the beginning of the (only) prompt; extended in place.
        measure_stages: also measure every stage; on accelerators this adds synchronisation.

    Raises:
        UsageError: an empty prompt, a token id outside the vocabulary, or more tokens than the context holds.
        NonFiniteError: NaN or infinity in the logits; nothing of that step is printed.
    """
    cache = chain.new_cache() if cache is None else cache
    prompts = [request.prompt_ids for request in requests]
    limits = [request.limits for request in requests]
    rooms = check_prompts(prompts, limits=limits, vocab_size=chain.config.vocab_size, has_decode=decode is not None)
    num_cached = int(cache.get_seq_length())
    check_cached(prompts, num_cached_tokens=num_cached)
    writers = [
        make_writer(request, place=place, room=room, decode=decode, on_text=on_text)
        for place, (request, room) in enumerate(zip(requests, rooms, strict=True))
    ]
    choosers = [
        TokenChooser(request.sampling, sequence_index=request.sequence_index, ending=request.ending(room))
        for request, room in zip(requests, rooms, strict=True)
    ]
    pad = padding_token(chain.generation_config, vocab_size=chain.config.vocab_size)
    batch = TokenBatch(prompts, num_new_tokens=max(rooms), pad_token_id=pad)
    state = Decoding(batch, cache)
    watch = _Watch(on_step=on_step, should_stop=should_stop, measures_stages=measure_stages)
    timing = _run(chain, state, writers, choosers, watch, chunk_tokens=limits[0].prefill_chunk_tokens)
    return Generation(
        sequences=tuple(writer.result() for writer in writers),
        num_prompt_tokens=sum(map(len, prompts)),
        num_cached_tokens=num_cached,
        time_to_first_token_seconds=timing.time_to_first_token_seconds,
        step_seconds=tuple(timing.step_seconds),
        prefill_stages=timing.prefill_stages,
        decode_stages=timing.decode_stages,
        cache=state.cache,
    )


@dataclass(frozen=True, slots=True)
class _Watch:
    on_step: OnStep | None
    should_stop: Callable[[], bool] | None
    measures_stages: bool


def make_writer(
    request: Request, *, place: int, room: int, decode: Decode | None, on_text: OnText | None
) -> SequenceWriter:
    """Return what collects the tokens of a request: at most `room` of them."""
    return SequenceWriter(
        place,
        prompt_ids=request.prompt_ids,
        max_tokens=room,
        eos_token_ids=request.limits.eos_token_ids,
        stop_strings=request.limits.stop_strings,
        is_stop=request.limits.is_stop,
        decode=decode,
        on_text=on_text,
    )


def _run(
    chain: Chain,
    state: Decoding,
    writers: Sequence[SequenceWriter],
    choosers: Sequence[TokenChooser],
    watch: _Watch,
    *,
    chunk_tokens: int | None,
) -> _Timing:
    timing = _Timing()
    if all(writer.is_finished for writer in writers):
        return timing
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        totals = stack.enter_context(stage_clock(chain)) if watch.measures_stages else []
        if totals:
            stack.enter_context(cache_clock(chain, state.cache, totals))
        while not all(writer.is_finished for writer in writers):
            before, past, length = [t.copy() for t in totals], int(state.cache.get_seq_length()), state.batch.length
            started = time.perf_counter()
            is_first = state.step == 0
            logits = prefill(chain, state, chunk_tokens=chunk_tokens) if is_first else decode_one_token(chain, state)
            tokens = _take_tokens(chain, state, logits, writers, choosers)
            timing.add(time.perf_counter() - started, is_first=is_first)
            timing.prefill_stages = tuple(t.copy() for t in totals) if is_first else timing.prefill_stages
            if watch.on_step is not None:
                stages = since(totals, before)
                watch.on_step(StepTrace(state.step - 1, len(writers), length - past, past, stages, tuple(tokens)))
            if watch.should_stop is not None and watch.should_stop():
                _interrupt(writers)
    timing.decode_stages = since(totals, timing.prefill_stages)
    return timing


def _interrupt(writers: Sequence[SequenceWriter]) -> None:
    for writer in writers:
        writer.interrupt()


def _forward(model: Any, state: Decoding, *, start: int, end: int) -> torch.Tensor:
    """Run columns [start, end) as `generate()` does; Phi-3 takes all columns again when its rotary factors switch."""
    inputs = model.prepare_inputs_for_generation(
        state.batch.ids(0, end),
        next_sequence_length=end - start,
        past_key_values=state.cache,
        attention_mask=state.batch.mask(end),
        position_ids=state.batch.positions(0, end),
        is_first_iteration=state.step == 0,
        use_cache=True,
        logits_to_keep=1,
    )
    outputs = model(**inputs, return_dict=True)
    # It does so with a new cache: the cache is taken back after every forward.
    state.cache = outputs.past_key_values
    with one_thread():
        logits: torch.Tensor = outputs.logits[:, -1].to(device="cpu", dtype=torch.float32)
    return logits


@one_thread()
def _take_tokens(
    chain: Chain,
    state: Decoding,
    logits: torch.Tensor,
    writers: Sequence[SequenceWriter],
    choosers: Sequence[TokenChooser],
) -> list[int]:
    require_finite(chain, logits, batch=state.batch, step=state.step)
    tokens = _choose(state.batch, logits, writers, choosers)
    # A finished sequence keeps its row, filled with padding, until the whole batch is done.
    for writer, token in zip(writers, tokens, strict=True):
        if not writer.is_finished:
            writer.add(token)
    state.batch.append(tokens)
    state.step += 1
    return tokens


def _choose(
    batch: TokenBatch,
    logits: torch.Tensor,
    writers: Sequence[SequenceWriter],
    choosers: Sequence[TokenChooser],
) -> list[int]:
    if all(chooser.is_plain_argmax for chooser in choosers):
        best: list[int] = logits.argmax(dim=-1).tolist()
        return [batch.pad_token_id if w.is_finished else token for w, token in zip(writers, best, strict=True)]
    return [
        batch.pad_token_id if writer.is_finished else chooser.choose(logits[row], token_ids=batch.sequence(row))
        for row, (writer, chooser) in enumerate(zip(writers, choosers, strict=True))
    ]
