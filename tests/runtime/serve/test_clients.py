"""OpenAI's own client gets what it expects, and a request the same bytes whatever runs beside it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from servers import Server, events_of

PROMPT = "def parse(text):\n    "
MESSAGES: Any = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]}]


def test_a_chat_is_the_same_whole_and_streamed(server: Server) -> None:
    client, settings = server.client(), {"max_tokens": 12, "temperature": 0.8, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(model="python-llama", messages=MESSAGES, top_logprobs=2, **settings)
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="python-llama", messages=MESSAGES, stream=True, stream_options=options, top_logprobs=2, **settings
    )
    *chunks, numbers = list(stream)
    choice = whole.choices[0]
    assert choice.message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [choice.finish_reason]
    assert numbers.choices == []
    assert numbers.usage.completion_tokens == whole.usage.completion_tokens == 12
    assert numbers.usage.total_tokens == whole.usage.total_tokens
    rows = [row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content]
    assert rows == choice.logprobs.content
    assert [len(row.top_logprobs) for row in rows] == [2] * 12


@pytest.mark.parametrize("prompt", [PROMPT, [11, 12, 13]], ids=["text", "ids"])
def test_a_completion_is_the_same_whole_and_streamed(server: Server, prompt: Any) -> None:
    client, settings = server.client(), {"max_tokens": 9, "n": 2, "temperature": 1.0, "seed": 3, "echo": True}
    whole = client.completions.create(model="python-llama", prompt=prompt, **settings)
    texts = ["", ""]
    for chunk in client.completions.create(model="python-llama", prompt=prompt, stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]
    assert whole.usage.completion_tokens == 18
    if prompt is PROMPT:
        assert all(text.startswith(PROMPT) for text in texts)


def test_there_is_one_event_per_token(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 7, "stream": True, "ignore_eos": True}
    events = events_of(server.ask("/v1/completions", body)[2])
    assert len(events) == 8  # the last one says how it ended
    assert not any("usage" in event for event in events)


def test_prompt_logprobs_are_those_of_the_unsplit_model(
    server: Server, shipped_reference: Callable[[torch.dtype], Any]
) -> None:
    ids = [5, 77, 301, 12, 40]
    answer = server.client().completions.create(
        model="python-llama", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    found = answer.choices[0].logprobs
    with torch.no_grad():
        expected = shipped_reference(torch.bfloat16)(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:5] == [float(expected[i, token]) for i, token in enumerate(ids[1:])]
    assert [max(top.values()) for top in found.top_logprobs[1:]] == [float(row.max()) for row in expected]


def test_requests_give_the_same_text_alone_and_together(server: Server) -> None:
    def ask(seed: int) -> str:
        body = {"prompt": PROMPT * (1 + seed % 3), "max_tokens": 5 + seed, "temperature": 0.9, "seed": seed}
        return str(json.loads(server.ask("/v1/completions", body)[2])["choices"][0]["text"])

    alone = [ask(seed) for seed in range(10)]
    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(ask, range(10))) == alone


def test_settings_reach_the_choice_of_tokens(server: Server) -> None:
    def text(**settings: Any) -> str:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **settings}
        return str(json.loads(server.ask("/v1/completions", body)[2])["choices"][0]["text"])

    plain = text()
    assert text(logit_bias={"5": 100}) != plain
    assert text(frequency_penalty=2) != text(frequency_penalty=-2)
    assert text(temperature=5, top_k=1, seed=1) == plain
    assert text(temperature=5, seed=1) != plain


def test_tokens_go_there_and_back(server: Server) -> None:
    tokens = json.loads(server.ask("/tokenize", {"prompt": "x = 1"})[2])
    back = json.loads(server.ask("/detokenize", {"tokens": tokens["tokens"]})[2])
    assert back["prompt"].endswith("x = 1")
    assert tokens["count"] == len(tokens["tokens"])
    assert [model.id for model in server.client().models.list()] == ["python-llama"]


def test_a_beginning_is_read_once(server: Server) -> None:
    def usage(prompt: list[int]) -> Any:
        return json.loads(server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})[2])["usage"]

    first = list(range(100, 140))
    usage(first)
    assert usage([*first, 7, 8])["prompt_tokens_details"] == {"cached_tokens": 40}


def test_the_log_has_no_prompts(server: Server) -> None:
    server.ask("/v1/completions", {"prompt": "a secret of mine", "max_tokens": 1})
    server.wait_until(lambda: "POST /v1/completions 200" in server.child.said)
    assert "secret" not in server.child.said
