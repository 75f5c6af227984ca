"""Thousands of requests from up to 32 users: does each get what it gets alone, and does anything stay behind?

Requests are drawn from some hundred different ones - text, ids and chats, of all lengths, with seeds, stops, several
answers - whose answers are asked for one by one before. Then between 1 and 32 at once come whole or streamed; a part of
them leaves: at once, while it waits or is read, or in the middle of its stream. Text, reasons and numbers of tokens are
compared, and the beginning where somebody left. Resident memory is that of all processes of the server.

Run: python -m benchmarks soak       (or python -m benchmarks.bench_soak --num 500 --processes 1 -- --reuse)
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.measure import SHIPPED
from benchmarks.servers import Served, llamarun, running

NUM_REQUESTS, NUM_DISTINCT, NUM_SLOTS, MOST_USERS = 10_000, 200, 8, 32
FIRST_LOOK, LOOK_EVERY, CHANGE_EVERY = 200, 500, 40
MEMORY_GROWTH = 0.05
PATIENCE_SECONDS = 0.15
"""How long those who leave before anything came wait at most."""

Answer = tuple[tuple[tuple[str, str | None], ...], int, int]
"""Text and finish reason of every choice, prompt tokens, new tokens."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One of the distinct requests."""

    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Seen:
    """What came of the requests of one run."""

    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    looks: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    """Requests so far, and resident bytes: of the process that was started, and of those below it."""


def main(arguments: Sequence[str] = ()) -> None:
    """Print a table for one process and one for two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=NUM_REQUESTS)
    parser.add_argument("--processes", type=int, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve_options", nargs="*", default=["--no-reuse"], help="of llamarun serve, after --")
    options = parser.parse_args(arguments)
    for count in (1, 2) if options.processes is None else (options.processes,):
        run(options.num, processes=count, seed=options.seed, serve_options=options.serve_options)


def run(num: int, *, processes: int, seed: int, serve_options: Sequence[str] = ()) -> None:
    """Print what became of `num` requests to the shipped checkpoint.

    Raises:
        SystemExit: something is not as it has to be.
    """
    with tempfile.TemporaryDirectory() as temp:
        target, more = SHIPPED, ["--slots", NUM_SLOTS, *serve_options]
        if processes == 2:
            target, more = _two_stages(Path(temp)), [*more, "--model", SHIPPED, "--processes"]
        with running(llamarun(target, *more), log=Path(temp) / "log") as served:
            started = time.perf_counter()
            seen = asyncio.run(_soak(served, num, seed=seed))
            seconds = time.perf_counter() - started
            print(f"\nllamarun serve {' '.join(map(str, more))}: {num} requests, {seconds:.0f} s", flush=True)
            ends_well = _report(seen, asyncio.run(_after(served)))
    if not ends_well:
        raise SystemExit(1)


def _two_stages(folder: Path) -> Path:
    from planner import solve_model

    plan = solve_model(SHIPPED, devices=["cpu=1GiB"] * 2, layers=(4, 3), ctx_size=1024)
    (folder / "plan.json").write_text(plan.to_json())
    return folder / "plan.json"


def _report(seen: Seen, after: dict[str, float]) -> bool:
    """Print everything, and return whether it is as it should be."""
    totals = [sum(sizes) for _count, sizes in seen.looks]
    growth, most = totals[-1] / totals[0] - 1, max(totals) / totals[0] - 1
    print("  " + ", ".join(f"{count} {way}" for way, count in sorted(seen.ways.items())))
    print(f"  answers that differ from the same request alone: {len(seen.wrong)}")
    for text in seen.wrong[:10]:
        print(f"    {text}")
    print("  afterwards: " + ", ".join(f"{value:g} {name}" for name, value in after.items()))
    sizes = ", ".join(f"{count}: {own / 2**20:.0f} + {below / 2**20:.0f}" for count, (own, below) in seen.looks)
    print(f"  resident MiB after so many requests, first process + others: {sizes}")
    print(f"  from {seen.looks[0][0]} to {seen.looks[-1][0]}: {growth:+.1%}, at most {most:+.1%}")
    is_idle = (after["running"], after["waiting"], after["running together"]) == (0, 0, NUM_SLOTS)
    return not seen.wrong and is_idle and growth <= MEMORY_GROWTH


async def _soak(served: Served, num: int, *, seed: int) -> Seen:
    draw, seen = random.Random(seed), Seen()
    distinct = [_draw_request(draw, served.model) for _ in range(NUM_DISTINCT)]
    async with _client(served) as client:
        alone = [await _whole(client, asked) for asked in distinct]
        running: set[asyncio.Task[None]] = set()
        users = 1
        for number in range(num):
            users = draw.randint(1, MOST_USERS) if number % CHANGE_EVERY == 0 else users
            while len(running) >= users:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            if number in {FIRST_LOOK, *range(LOOK_EVERY, num, LOOK_EVERY)}:
                seen.looks.append((number, served.resident_bytes()))
            which, chance, way = draw.randrange(NUM_DISTINCT), draw.random(), draw.random()
            running.add(asyncio.create_task(_one(client, distinct[which], alone[which], seen, way=way, chance=chance)))
        await asyncio.gather(*running)
    seen.looks.append((num, served.resident_bytes()))
    return seen


def _draw_request(draw: random.Random, model: str) -> Asked:
    """Return a request of any kind; most are short, some are as long as the context allows."""
    words = SHIPPED.parents[1].joinpath("conftest.py").read_text()
    body: dict[str, Any] = {"model": model, "max_tokens": min(200, 1 + int(draw.expovariate(1 / 24)))}
    body |= draw.choice(({"temperature": 0}, {"temperature": 0.8}, {"temperature": 1.3, "top_p": 0.9}))
    body |= {"seed": draw.randrange(2**32)} | ({"n": draw.randint(2, 3)} if draw.random() < 0.15 else {})
    body |= {"stop": draw.choice(("\n", "self", [")", "return"], "e"))} if draw.random() < 0.3 else {}
    body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.1} if draw.random() < 0.1 else {}
    start, kind = draw.randrange(len(words) // 2), draw.random()
    length = min(1200, 1 + int(draw.expovariate(1 / 200)))
    if kind < 0.3:
        message = {"role": "user", "content": words[start : start + length]}
        return Asked("/v1/chat/completions", {**body, "messages": [message]})
    ids = [draw.randrange(3, 1000) for _ in range(min(length, 800))]
    return Asked("/v1/completions", {**body, "prompt": words[start : start + length] if kind < 0.7 else ids})


def _client(served: Served) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=MOST_USERS)
    return httpx2.AsyncClient(base_url=served.url, timeout=600, limits=limits)


async def _one(
    client: httpx2.AsyncClient, asked: Asked, alone: Answer, seen: Seen, *, way: float, chance: float
) -> None:
    """Ask in the way that `way` draws; `chance` says when those leave who do."""
    if way < 0.4:
        name, found = "whole", await _whole(client, asked)
        is_right = found == alone
    elif way < 0.75:
        name, found = "streamed", await _streamed(client, asked, most_events=None)
        is_right = found == alone
    elif way < 0.87:
        name = "left in the stream"
        found = await _streamed(client, asked, most_events=1 + int(chance * 20))
        is_right = all(whole.startswith(text) for (text, _), (whole, _) in zip(found[0], alone[0], strict=True))
    else:
        name, found, is_right = "left before the answer", None, True
        with suppress(TimeoutError):
            async with asyncio.timeout(chance * PATIENCE_SECONDS):
                name, found = "whole", await _whole(client, asked)
                is_right = found == alone
    seen.ways[name] += 1
    if not is_right:
        seen.wrong.append(f"{name} {json.dumps(asked.body)[:200]}: {found} instead of {alone}"[:1500])


async def _whole(client: httpx2.AsyncClient, asked: Asked) -> Answer:
    answer = await client.post(asked.path, json=asked.body)
    document = answer.json()
    assert answer.status_code == 200, document
    choices = tuple((_text(choice), choice["finish_reason"]) for choice in document["choices"])
    return choices, document["usage"]["prompt_tokens"], document["usage"]["completion_tokens"]


async def _streamed(client: httpx2.AsyncClient, asked: Asked, *, most_events: int | None) -> Answer:
    """Return what a stream said, or its beginning; the connection is closed then."""
    texts = [""] * asked.body.get("n", 1)
    reasons: list[str | None] = [None] * len(texts)
    usage: dict[str, int] = {"prompt_tokens": 0, "completion_tokens": 0}
    count = 0
    async with aclosing(_events(client, asked)) as events:
        async for event in events:
            assert "error" not in event, event
            usage = event["usage"] or usage
            for choice in event["choices"]:
                texts[choice["index"]] += _text(choice)
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            count += 1
            if count == most_events:
                break
    return tuple(zip(texts, reasons, strict=True)), usage["prompt_tokens"], usage["completion_tokens"]


async def _events(client: httpx2.AsyncClient, asked: Asked) -> AsyncIterator[dict[str, Any]]:
    body = {**asked.body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", asked.path, json=body) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return
            if line:
                yield json.loads(line.removeprefix("data: "))
    raise AssertionError("a stream without an end")


def _text(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content") or "")


async def _after(served: Served) -> dict[str, float]:
    """Return what the server says once nobody asks any more, and how many can then run together."""
    deadline = time.perf_counter() + 10
    while (left := served.metrics())["requests_running"] or left["requests_waiting"]:
        assert time.perf_counter() < deadline, left
        await asyncio.sleep(0.1)
    body = {"prompt": [5], "max_tokens": 1000, "ignore_eos": True, "n": NUM_SLOTS}
    together = 0.0
    async with _client(served) as client, aclosing(_events(client, Asked("/v1/completions", body))) as events:
        async for _event in events:
            together = served.metrics()["requests_running"]
            if together == NUM_SLOTS:
                break
    return {
        "running": left["requests_running"],
        "waiting": left["requests_waiting"],
        "slots": left["slots"],
        "running together": together,
        "tokens reserved": left["kv_tokens_reserved"],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
