"""Users of a server: streamed completions with the moment of every token, over bare sockets, which cost little."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(slots=True)
class Stream:
    """What one user saw.

    Attributes:
        started: when the request was sent.
        moments: when each token came.
        num_prompt_tokens, num_new_tokens: as the server counts them.
    """

    started: float
    moments: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        """How long the first token took."""
        return self.moments[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.moments)]


async def ask(
    port: int, prompt_ids: Sequence[int], *, model: str, new_tokens: int, stream: Stream | None = None
) -> Stream:
    """Have a prompt continued by exactly so many tokens; `stream` is filled as they come.

    Raises:
        ValueError: the server answers something else, or counts differently.
    """
    body: dict[str, Any] = {"model": model, "prompt": list(prompt_ids), "max_tokens": new_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    seen = stream or Stream(0.0)
    seen.started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + data)
        async for event in _events(reader):
            if b'"text"' in event:
                seen.moments.append(time.perf_counter())
            if b'"usage":{' in event.replace(b" ", b""):
                usage = json.loads(event)["usage"]
                seen.num_prompt_tokens, seen.num_new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    finally:
        writer.close()
    if (seen.num_prompt_tokens, seen.num_new_tokens) != (len(prompt_ids), new_tokens):
        raise ValueError(f"asked for {len(prompt_ids)} + {new_tokens} tokens, counted {seen}")
    return seen


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events in a chunked answer."""
    status, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    if b" 200 " not in status:
        raise ValueError(f"{status!r}: {(await reader.read(2000))!r}")
    left = b""
    while size := int(await reader.readline(), 16):
        *events, left = (left + await reader.readexactly(size)).split(b"\n\n")
        await reader.readexactly(2)
        for event in events:
            data = event.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            yield data


async def wave(port: int, prompts: Sequence[Sequence[int]], *, model: str, new_tokens: int) -> list[Stream]:
    """Ask everything at the same time."""
    return list(await asyncio.gather(*(ask(port, ids, model=model, new_tokens=new_tokens) for ids in prompts)))


async def longest_gap(
    port: int, prompts: Sequence[Sequence[int]], *, model: str, running_tokens: int, new_tokens: int
) -> float:
    """Return the longest gap in a stream, the first prompt's, while the other prompts arrive together."""
    running = Stream(0.0)
    first, *others = prompts
    task = asyncio.create_task(ask(port, first, model=model, new_tokens=running_tokens, stream=running))
    while len(running.moments) < 8 and not task.done():
        await asyncio.sleep(0.002)
    arrived = time.perf_counter()
    crowd = await wave(port, others, model=model, new_tokens=new_tokens)
    everybody_reads_until = max(stream.moments[0] for stream in crowd)
    await task
    if running.moments[-1] < everybody_reads_until:
        raise ValueError("the running stream ended before the others had begun")
    return max(
        after - before
        for before, after in pairwise(running.moments)
        if after > arrived and before < everybody_reads_until
    )
