"""The engine: many requests share a model, and none of them can tell."""

import itertools
import threading
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from many import Alone, Heard, ask, hear, letters

from plans.errors import LlamaplanError, MachineError, UsageError
from runtime.engine.budget import Budget
from runtime.engine.engine import Engine, Ticket
from runtime.engine.events import Event, Token
from runtime.engine.sequence import Sequence
from runtime.engine.turns import Turns
from runtime.generate.numerics import NonFiniteError
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.session import Session

PROMPT = [7, 8, 9, 10, 11, 7, 8, 9, 10]


REQUESTS = st.builds(
    lambda prompt, new, seed, index, stop, top: ask(
        prompt,
        max_tokens=new,
        sampling=Sampling() if seed is None else Sampling(temperature=0.9, seed=seed, frequency_penalty=0.3),
        index=index,
        stop_strings=(stop,) if stop else (),
        num_top=top,
        tells_prompt=top == 2,
    ),
    st.lists(st.integers(3, 96), min_size=1, max_size=40),
    st.integers(0, 9),
    st.none() | st.integers(0, 3),
    st.integers(0, 2),
    st.none() | st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefgh", min_size=1, max_size=2),
    st.none() | st.integers(0, 2),
)


@settings(max_examples=25)
@given(data=st.data())
def test_a_request_gives_the_same_events_at_any_load(tiny_session: Session, alone: Alone, data: Any) -> None:
    engine = Engine(tiny_session, num_slots=data.draw(st.integers(1, 5)), decode=letters)
    arrivals = data.draw(st.lists(st.tuples(REQUESTS, st.integers(0, 6), st.none() | st.integers(0, 4)), max_size=8))
    heard = [Arriving(engine, *arrival) for arrival in arrivals]
    while not all(entry.heard.is_over for entry in heard):
        for entry in heard:
            entry.tick()
        engine.step()
    for (request, _, cancelled_after), entry in zip(arrivals, heard, strict=True):
        expected = alone(request).events
        if cancelled_after is None:
            assert entry.heard.events == expected
        else:
            assert entry.heard.events[:-1] == expected[: len(entry.heard.events) - 1]
    assert engine.counters.num_running == engine.counters.num_waiting == engine.counters.kv_tokens_reserved == 0


class Arriving:
    """A request that comes after some steps, and may go again."""

    def __init__(self, engine: Engine, request: Request, after: int, cancelled_after: int | None) -> None:
        self.heard = Heard()
        self._engine, self._request, self._after, self._cancelled_after = engine, request, after, cancelled_after
        self._ticket: Ticket | None = None

    def tick(self) -> None:
        self._after -= 1
        if self._after < 0 and self._ticket is None:
            self._ticket = self._engine.submit(self._request, on_event=self.heard)
        elif self._ticket is not None and self._cancelled_after is not None:
            self._cancelled_after -= 1
            if self._cancelled_after < 0:
                self._ticket.cancel()


def test_a_cancelled_request_gives_its_slot_to_who_waits_within_one_step(tiny_session: Session) -> None:
    engine, first, second = Engine(tiny_session, decode=letters), Heard(), Heard()

    def hang_up(event: Event) -> None:
        first(event)
        if len(first.tokens) == 2:
            ticket.cancel()

    ticket = engine.submit(ask(PROMPT), on_event=hang_up)
    engine.submit(ask(PROMPT), on_event=second)
    never = engine.submit(ask(PROMPT), on_event=(third := Heard()))
    never.cancel()
    engine.run_all()
    assert (len(first.tokens), first.reason) == (2, "interrupted")
    assert (len(second.tokens), second.reason) == (12, "length")
    assert (third.tokens, third.reason) == ([], "interrupted")
    assert engine.counters.totals.endings == {"interrupted": 2, "length": 1}


def test_a_kept_beginning_is_not_read_again_and_only_by_the_same_key(tiny_session: Session, alone: Alone) -> None:
    engine = Engine(tiny_session, num_slots=2, decode=letters)
    [first] = hear(engine, ask(PROMPT), key="a")
    longer = [*PROMPT, *first.tokens, 20, 21]
    stranger, mine = hear(engine, ask(longer), key="b"), hear(engine, ask(longer), key="a")
    assert [found[0].usage.num_cached_tokens for found in (stranger, mine)] == [0, len(PROMPT) + 11]
    assert stranger[0].tokens == mine[0].tokens == alone(ask(longer)).tokens
    [cut] = hear(engine, ask(PROMPT[:5]), key="a")
    assert (cut.usage.num_cached_tokens, cut.tokens) == (4, alone(ask(PROMPT[:5])).tokens)
    assert [heard.usage.num_cached_tokens for heard in hear(engine, ask(longer), ask(longer))] == [0, 0]


def test_what_may_not_fit_waits_and_what_can_never_fit_is_refused_with_both_numbers(tiny_session: Session) -> None:
    budget = Budget.of(tiny_session.prepared, num_sequences=2, cache_tokens=len(PROMPT) + 12)
    engine = Engine(tiny_session, num_slots=8, budget=budget, decode=letters)
    most = 0

    def watch(_event: Event) -> None:
        nonlocal most
        most = max(most, engine.counters.num_running)

    for _ in range(5):
        engine.submit(ask(PROMPT), on_event=watch, reuse_key="same")
    engine.run_all()
    assert (most, engine.counters.totals.endings) == (2, {"length": 5})
    with pytest.raises(UsageError, match=r"43 tokens need .*\(27520 bytes\) .* has .*\(26880 bytes\)"):
        engine.submit(ask(PROMPT, max_tokens=34), on_event=watch)
    with pytest.raises(
        UsageError, match=r"9 prompt tokens and 300 new ones are 53 more than the context holds \(256\)"
    ):
        engine.submit(ask(PROMPT, max_tokens=300), on_event=watch)


def test_a_full_queue_and_an_ending_engine_take_nothing_new(tiny_session: Session) -> None:
    engine, heard = Engine(tiny_session, queue_limit=1, decode=letters), Heard()
    engine.submit(ask(PROMPT), on_event=heard)
    with pytest.raises(MachineError, match="1 requests are waiting already") as full:
        engine.submit(ask(PROMPT), on_event=heard)
    assert full.value.code == "E-QUEUE"
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.drain(600)
    thread.join()
    assert heard.reason == "length"
    with pytest.raises(MachineError, match="takes nothing new"):
        engine.submit(ask(PROMPT), on_event=heard)


def test_stopping_ends_what_runs_and_what_waits(tiny_session: Session) -> None:
    engine, first, second = Engine(tiny_session, decode=letters), Heard(), Heard()

    def stop(event: Event) -> None:
        first(event)
        engine.stop()

    engine.submit(ask(PROMPT, prefill_chunk_tokens=None), on_event=stop)
    engine.submit(ask(PROMPT), on_event=second)
    engine.run()
    assert (first.tokens[1:], first.reason, second.reason) == ([], "interrupted", "interrupted")


def test_not_a_number_ends_one_request_and_nobody_else(tiny_session: Session, alone: Alone) -> None:
    def poison(_module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if (inputs[0] == 96).any() else output

    expected = [alone(ask([token, 8, 9])) for token in (5, 6)]
    assert 96 not in [token for heard in expected for token in heard.tokens]
    hook = tiny_session.chain.get_input_embeddings().register_forward_hook(poison)
    try:
        heard = hear(Engine(tiny_session, num_slots=3, decode=letters), *(ask([token, 8, 9]) for token in (5, 96, 6)))
    finally:
        hook.remove()
    assert isinstance(heard[1].error, NonFiniteError)
    assert [heard[0].events, heard[2].events] == [found.events for found in expected]


def test_settings_that_leave_no_token_end_one_request(tiny_session: Session, alone: Alone) -> None:
    impossible = Sampling(rules={"suppress_tokens": list(range(97))})
    one, other = hear(Engine(tiny_session, num_slots=2, decode=letters), ask(PROMPT, sampling=impossible), ask(PROMPT))
    assert one.error.code == "E-MASKED"
    assert other.events == alone(ask(PROMPT)).events


def test_a_fault_of_the_engine_is_told_to_everybody_and_nothing_is_taken_after_it(tiny_session: Session) -> None:
    engine, heard = Engine(tiny_session, decode=letters), [Heard(), Heard()]
    engine.submit(ask(PROMPT), on_event=heard[0])
    engine.submit(ask(PROMPT), on_event=heard[1])

    def burn(*_: object) -> None:
        raise OSError("the device is on fire")

    hook = tiny_session.chain.get_input_embeddings().register_forward_hook(burn)
    try:
        with pytest.raises(OSError, match="on fire"):
            engine.run()
    finally:
        hook.remove()
    assert [str(found.error) for found in heard] == ["OSError: the device is on fire"] * 2
    with pytest.raises(LlamaplanError, match="on fire"):
        engine.submit(ask(PROMPT), on_event=heard[0])


def test_likelihoods_are_those_of_the_model_for_the_prompt_and_what_follows(tiny_session: Session) -> None:
    [heard] = hear(Engine(tiny_session, decode=letters), ask(PROMPT, max_tokens=3, num_top=4, tells_prompt=True))
    ids = [*PROMPT, *heard.tokens]
    with torch.inference_mode():
        expected = torch.log_softmax(tiny_session.chain(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    found = [*heard.prompt, *(event.likely for event in heard.events if isinstance(event, Token))]
    assert [likely.token_id for likely in found] == ids[1:]
    for scores, likely in zip(expected, found, strict=False):
        assert likely.logprob == pytest.approx(float(scores[likely.token_id]), abs=1e-4)
        assert [token for token, _ in likely.top] == scores.topk(4).indices.tolist()
    [nothing] = hear(Engine(tiny_session, decode=letters), ask(PROMPT, max_tokens=0, num_top=0, tells_prompt=True))
    assert [likely.token_id for likely in nothing.prompt] == PROMPT[1:]
    assert (nothing.tokens, nothing.reason) == ([], "length")


def test_penalties_count_the_answer_alone_and_biases_are_added(tiny_session: Session) -> None:
    engine = Engine(tiny_session, decode=letters)
    [forced] = hear(engine, ask(PROMPT, sampling=Sampling(logit_bias={9: 1000.0})))
    assert forced.tokens == [9] * 12
    [never_twice] = hear(engine, ask(PROMPT, sampling=Sampling(logit_bias={9: 1000.0}, presence_penalty=2000.0)))
    assert never_twice.tokens.count(9) == 1
    assert len(set(never_twice.tokens)) == 12


def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others(tiny_session: Session) -> None:
    engine, order = Engine(tiny_session, num_slots=3, decode=letters), []
    calls: list[int] = []
    hook = tiny_session.chain.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: calls.append(inputs[0].shape[1])
    )
    engine.submit(ask(PROMPT[:3], max_tokens=30), on_event=order.append)
    for _ in range(3):
        engine.step()
    for _ in range(2):
        engine.submit(ask(PROMPT * 4, max_tokens=2), on_event=order.append)
    engine.run_all()
    hook.remove()
    pieces = [at for at, tokens in enumerate(calls) if tokens > 1]
    assert [calls[at] for at in pieces[1:]] == [8, 8, 8, 8, 4] * 2
    between = [at - 1 - place for place, at in enumerate(pieces[1:])]  # steps of the first one before a piece
    assert [later > earlier for earlier, later in itertools.pairwise(between)] == [False, True] * 4 + [False]


def test_a_prompt_fills_the_chain_while_all_who_decode_are_under_way() -> None:
    turns = Turns(depth=2, reads_first=False)
    first, second = (Mock(spec=Sequence, is_reading=True, is_ready=True, num_next_tokens=9, turn=-1) for _ in range(2))
    assert turns.next([first, second]) == [first]
    first.is_reading = first.is_ready = False  # all of it was sent, and its token is not there yet
    assert turns.next([first, second]) == [second]
    first.is_ready = True
    assert turns.next([first, second]) == [first]
