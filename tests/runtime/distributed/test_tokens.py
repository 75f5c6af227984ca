"""Several processes give the tokens of one process, whatever is in flight."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from exporter import export
from plans.errors import UsageError
from runtime.distributed.session import ProcessSession
from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.engine.run import generate_requests
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.generate.writer import GeneratedSequence
from runtime.prepared import prepare_session
from runtime.reading.opening import open_source
from runtime.session import Session, load_session
from tests.exporter.export_helpers import make_plan
from tests.runtime.reading.test_families import family_config

PROMPTS = [
    "def __init__(self, ",
    "import os\n\n\nclass Path",
    "x",
    "for name in names:\n    if name.startswith(",
]
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=7)
LIMITS = Limits(context_tokens=256, max_tokens=14)

Start = Callable[[int], Any]


def requests_of(session: Session, *, sampling: Sampling, limits: Limits = LIMITS) -> list[Request]:
    tokenizer = session.prepared.tokenizer
    return [
        Request(prompt_ids=tokenizer(text).input_ids, sampling=sampling, limits=limits, sequence_index=index)
        for index, text in enumerate(PROMPTS)
    ]


def tokens_of(session: Session | ProcessSession, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    return [sequence.token_ids for sequence in generate_requests(session, requests).sequences]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_several_sequences_give_the_tokens_of_one_process(
    in_one_process: Start, in_processes: Start, num_stages: int, sampling: Sampling
) -> None:
    requests = requests_of(in_one_process(num_stages), sampling=sampling)
    assert tokens_of(in_processes(num_stages), requests) == tokens_of(in_one_process(num_stages), requests)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 64])
def test_a_prompt_read_in_chunks_gives_the_tokens_of_one_process(
    in_one_process: Start, in_processes: Start, chunk_tokens: int
) -> None:
    limits = replace(LIMITS, prefill_chunk_tokens=chunk_tokens)
    requests = requests_of(in_one_process(3), sampling=SAMPLED, limits=limits)
    assert tokens_of(in_processes(3), requests) == tokens_of(in_one_process(3), requests)


@pytest.mark.row("P18")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_the_checkpoint_asks_of_scores_reaches_the_process_that_chooses(
    in_one_process: Start, in_processes: Start, sampling: Sampling
) -> None:
    rules = {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "forced_eos_token_id": 9, "sequence_bias": [[[45], 3.0]]}
    limits = replace(LIMITS, eos_token_ids=frozenset({2, 7}))
    requests = requests_of(in_one_process(3), sampling=replace(sampling, rules=rules), limits=limits)
    found = tokens_of(in_processes(3), requests)
    assert found == tokens_of(in_one_process(3), requests)
    assert {tokens[-1] for tokens in found if len(tokens) == 14} <= {9}


@pytest.fixture(scope="module")
def crowd(in_one_process: Start) -> Callable[[int], list[tuple[Request, GeneratedSequence]]]:
    """Requests, and what each gives that has so many stages in one process to itself."""

    @cache
    def compute(num_stages: int) -> list[tuple[Request, GeneratedSequence]]:
        whole = in_one_process(num_stages)
        limits = replace(LIMITS, prefill_chunk_tokens=4, eos_token_ids=whole.prepared.eos_token_ids)
        once = requests_of(whole, sampling=SAMPLED, limits=limits)
        requests = [replace(request, sequence_index=index) for index, request in enumerate(once * 2)]
        return [(request, alone(whole, request)) for request in requests]

    return compute


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 5, 8])
def test_tokens_do_not_depend_on_what_else_is_in_flight(
    crowd: Callable[[int], list[tuple[Request, GeneratedSequence]]],
    in_processes: Start,
    num_stages: int,
    num_slots: int,
) -> None:
    requests, expected = zip(*crowd(num_stages), strict=True)
    engine, heard = Engine(in_processes(num_stages), num_slots=num_slots), [Heard() for _ in requests]
    for request, one in zip(requests, heard, strict=True):
        engine.submit(request, on_event=one)
    engine.run_all()
    assert [one.sequence() for one in heard] == list(expected)


def alone(session: Session, request: Request) -> GeneratedSequence:
    """What a request gives that has the model to itself."""
    return generate_requests(session, [request], decode=session.prepared.decode).sequences[0]


def test_a_kept_beginning_stays_on_every_stage(in_one_process: Start, in_processes: Start) -> None:
    engine = Engine(in_processes(3), num_slots=2)
    first = requests_of(in_one_process(3), sampling=SAMPLED)[1]
    for request, cached in ((first, 0), (replace(first, prompt_ids=[*first.prompt_ids, 9]), len(first.prompt_ids))):
        heard = Heard()
        engine.submit(request, on_event=heard, reuse_key="mine")
        engine.run_all()
        assert heard.sequence() == alone(in_one_process(3), request)
        assert heard.usage is not None
        assert heard.usage.num_cached_tokens == cached
    engine.abandon()


def test_a_cancelled_request_leaves_the_others_alone(in_one_process: Start, in_processes: Start) -> None:
    requests = requests_of(in_one_process(3), sampling=SAMPLED)
    engine, heard = Engine(in_processes(3), num_slots=2), [Heard() for _ in requests]
    tickets = [engine.submit(request, on_event=one) for request, one in zip(requests, heard, strict=True)]
    while len(heard[0].token_ids) < 3:
        engine.step()
    tickets[0].cancel()
    engine.run_all()
    assert heard[0].sequence().finish_reason == "interrupted"
    expected = [alone(in_one_process(3), request) for request in requests]
    assert [one.sequence() for one in heard[1:]] == expected[1:]
    assert tuple(heard[0].token_ids) == expected[0].token_ids[: len(heard[0].token_ids)]


def test_each_process_holds_only_its_own_stage(in_processes: Start) -> None:
    views = in_processes(3).stage_views(batch_size=1)
    whole = sum(view.decode_read_bytes for view in views)
    assert all(0 < view.decode_read_bytes < 0.7 * whole for view in views)


def test_stage_times_come_from_every_process(in_one_process: Start, in_processes: Start) -> None:
    requests = requests_of(in_one_process(3), sampling=GREEDY)[:1]
    generation = generate_requests(in_processes(3), requests, measure_stages=True)
    assert len(generation.prefill_stages) == len(generation.decode_stages) == 3
    assert all(time.compute_seconds > 0 for time in (*generation.prefill_stages, *generation.decode_stages))
    assert len(generation.step_seconds) == 13


@pytest.mark.row("N18")
def test_a_prompt_that_is_too_long_leaves_the_session_usable(in_one_process: Start, in_processes: Start) -> None:
    requests = requests_of(in_one_process(2), sampling=GREEDY)
    with pytest.raises(UsageError, match="more than the context holds"):
        generate_requests(in_processes(2), [replace(requests[0], prompt_ids=[5] * 250)])
    assert tokens_of(in_processes(2), requests) == tokens_of(in_one_process(2), requests)


def test_a_generation_that_is_given_up_leaves_the_session_usable(in_one_process: Start, in_processes: Start) -> None:
    requests = requests_of(in_one_process(3), sampling=SAMPLED)

    def give_up(_place: int, _piece: str) -> None:
        raise KeyboardInterrupt

    session = in_processes(3)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            generate_requests(session, requests, decode=session.prepared.decode, on_text=give_up)
    assert tokens_of(session, requests) == tokens_of(in_one_process(3), requests)


def test_nothing_to_generate_is_an_answer(in_one_process: Start, in_processes: Start) -> None:
    requests = requests_of(in_one_process(2), sampling=GREEDY, limits=replace(LIMITS, max_tokens=0))
    assert tokens_of(in_processes(2), requests) == [()] * len(requests)


def test_long_rope_switches_in_every_process_at_once(
    make_whole: Callable[[PreTrainedConfig], Path], join_processes: Callable[..., ProcessSession], tmp_path: Path
) -> None:
    """Phi-3 takes other factors once a sequence is past its first 32 positions: while it generates or in the prompt."""
    config, folder = family_config("phi3 with long rope"), tmp_path / "export"
    config.vocab_size = 2048  # the tokenizer's
    model = make_whole(config)
    export(make_plan(model, [2, 1, 2], devices=["cpu#0", "cpu#1", "cpu#2"]), model=model, output=folder)
    prepared = prepare_session(open_source(folder, model=None), device_map={}, context_tokens=96)
    whole = load_session(prepared)
    with join_processes(folder, prepared) as session:
        for length, chunk_tokens in ((20, None), (25, 4), (45, 10), (45, 40), (60, None)):
            limits = Limits(context_tokens=96, max_tokens=30, prefill_chunk_tokens=chunk_tokens)
            requests = [
                Request(prompt_ids=list(range(3, 3 + size)), sampling=SAMPLED, limits=limits, sequence_index=index)
                for index, size in enumerate((length, length - 5))
            ]
            assert tokens_of(session, requests) == tokens_of(whole, requests), (length, chunk_tokens)
