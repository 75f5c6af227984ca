"""A few requests from beginning to end: what the commands that are no server do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial

from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.engine.model import Facts, Model
from runtime.generate.clock import watch_chain
from runtime.generate.limits import Limits, check_prompts
from runtime.generate.request import Generation, Request
from runtime.generate.sampling import Sampling
from runtime.generate.text import Decode
from runtime.generate.writer import OnText
from runtime.stage_time import OnStep, StageWatch, StepTrace
from runtime.stages.chain import Chain
from runtime.steps.local import LocalSteps


def generate_requests(
    model: Model,
    requests: Sequence[Request],
    *,
    decode: Decode | None = None,
    on_text: OnText | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    measure_stages: bool = False,
) -> Generation:
    """Continue every request: all prompts are read first, then all sequences go on together until each is finished.

    Args:
        model: the model.
        requests: prompts with their settings.
        decode: token ids -> text; needed for text, streaming and stop strings.
        on_text: receives the place in `requests` and text as soon as it is certain, whole characters only.
        on_step: told what each step did.
        should_stop: asked after every step; once true, unfinished sequences end as `interrupted`.
        measure_stages: also measure every stage; on accelerators this adds synchronisation.

    Raises:
        UsageError: an empty prompt, a token id outside the vocabulary, or more tokens than the context holds.
        NumericalError: NaN or infinity in the logits; nothing of that step is printed.
    """
    rooms = check_prompts(
        [request.prompt_ids for request in requests],
        limits=[request.limits for request in requests],
        vocab_size=model.prepared.vocab_size,
        has_decode=decode is not None,
    )
    longest = max(len(request.prompt_ids) + room for request, room in zip(requests, rooms, strict=True))
    engine = Engine(model, num_slots=len(requests), cache_tokens=longest, decode=decode or _no_text, reads_first=True)
    with ExitStack() as stack:
        watch = stack.enter_context(model.watch_stages()) if measure_stages else None
        heard = [Heard(None if on_text is None else partial(on_text, place)) for place in range(len(requests))]
        _follow(engine, requests, heard, watch=watch, on_step=on_step, should_stop=should_stop)
        prefill_stages, decode_stages = ((), ()) if watch is None else watch.phases()
    sequences = tuple(one.sequence() for one in heard)
    longest_one = max(heard, key=lambda one: len(one.token_ids))
    return Generation(
        sequences=sequences,
        num_prompt_tokens=sum(len(request.prompt_ids) for request in requests),
        num_cached_tokens=sum(one.usage.num_cached_tokens for one in heard if one.usage),
        time_to_first_token_seconds=max(one.first_token_seconds for one in heard),
        step_seconds=tuple(longest_one.step_seconds),
        prefill_stages=prefill_stages,
        decode_stages=decode_stages,
    )


def _follow(
    engine: Engine,
    requests: Sequence[Request],
    heard: Sequence[Heard],
    *,
    watch: StageWatch | None,
    on_step: OnStep | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Run all requests, step by step, and tell of every step that gave tokens."""
    tickets = [engine.submit(request, on_event=one) for request, one in zip(requests, heard, strict=True)]
    num_prompt_tokens, step = max(len(request.prompt_ids) for request in requests), 0
    while not engine.is_idle:
        before = [len(one.token_ids) for one in heard]
        engine.step()
        if any(one.has_failed for one in heard):
            break
        new = [one.token_ids[count:] for one, count in zip(heard, before, strict=True)]
        if not any(new) or engine.is_reading:
            continue
        if step == 0 and watch is not None:
            watch.prompts_are_read()
        if on_step is not None:
            past, stages = num_prompt_tokens + step - 1, () if watch is None else watch.take_step()
            tokens = tuple(token for ids in new for token in ids)
            trace = StepTrace(step, len(requests), 1, past, stages, tokens)
            on_step(trace if step else replace(trace, num_tokens=num_prompt_tokens, num_past_tokens=0))
        step += 1
        if should_stop is not None and should_stop():
            for ticket in tickets:
                ticket.cancel()
    for ticket in tickets:  # where one has failed
        ticket.cancel()
    engine.run_all()


def _no_text(_token_ids: Sequence[int]) -> str:
    return ""


class BareChain:
    """A chain without the files it came from, as a model for an engine; how much memory there is, is not asked."""

    own_decode: Decode | None = None
    context_tokens = 2**31

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.vocab_size: int = chain.config.vocab_size

    @property
    def prepared(self) -> Facts:
        """What was known before loading."""
        return self

    def cache_bytes(self, num_tokens: int) -> tuple[int, ...]:  # noqa: ARG002
        """Return nothing."""
        return ()

    def new_steps(self) -> LocalSteps:
        """Return what computes the steps of an engine."""
        return LocalSteps(self._chain)

    def watch_stages(self) -> AbstractContextManager[StageWatch]:
        """Measure what the stages do inside the block."""
        return watch_chain(self._chain)


def generate(
    chain: Chain,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    limits: Limits,
    decode: Decode | None = None,
    on_text: OnText | None = None,
    measure_stages: bool = False,
) -> Generation:
    """Continue every prompt with the same settings; arguments and errors as `generate_requests`."""
    requests = [
        Request(prompt_ids=prompt, sampling=sampling, limits=limits, sequence_index=index)
        for index, prompt in enumerate(prompts)
    ]
    return generate_requests(BareChain(chain), requests, decode=decode, on_text=on_text, measure_stages=measure_stages)
