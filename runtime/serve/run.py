"""The server as a whole: the model in this thread, the clients in another, and how both end."""

import asyncio
import contextlib
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import uvicorn

from plans.commands.console import Output
from plans.reading.sizes import format_bytes
from runtime.engine.budget import Budget
from runtime.engine.engine import Engine
from runtime.serve.app import WRITE_SECONDS, Service, build_app
from runtime.serve.guard import Rules
from runtime.serve.reader import Reader
from runtime.session import AnySession

GRACE_SECONDS = 5
"""What the last answers may take to be sent once the engine has ended."""
STATUS_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How a model is served.

    Attributes:
        name: what clients call it.
        num_slots: requests that run at once.
        queue_limit: requests that may wait.
        drain_seconds: how long running requests may go on after the first signal.
        has_reuse: whether beginnings of prompts are kept.
        chunk_tokens: prompt tokens per step.
        rules: who may ask.
        url: where it listens, for people.
    """

    name: str
    num_slots: int
    queue_limit: int
    drain_seconds: float
    has_reuse: bool
    chunk_tokens: int | None
    rules: Rules
    url: str


def serve(session: AnySession, listener: socket.socket, settings: ServeSettings, *, output: Output) -> None:
    """Serve until a signal ends it.

    Args:
        session: the loaded model; this thread runs it.
        listener: where clients connect.
        settings: how.
        output: told what happens.

    Raises:
        LlamaplanError: the fault that ended the engine; every client has been told.
    """
    prepared = session.prepared
    budget = Budget.of(prepared, num_sequences=settings.num_slots)
    engine = Engine(session, num_slots=settings.num_slots, budget=budget, queue_limit=settings.queue_limit)
    service = Service(
        prepared=prepared,
        engine=engine,
        reader=Reader(prepared),
        name=settings.name,
        has_reuse=settings.has_reuse,
        chunk_tokens=settings.chunk_tokens,
    )
    _allow_connections()
    _limit_writes(listener)
    with (
        contextlib.closing(service.reader),
        _clients(service, listener, settings, output),
        _ending(engine, settings, output),
        _status_line(engine, output),
    ):
        _announce(settings, prepared.context_tokens, sum(budget.limits), output)
        engine.run()


def _announce(settings: ServeSettings, context_tokens: int, kv_bytes: int, output: Output) -> None:
    slots = f"{settings.num_slots} slots of {context_tokens} tokens, {format_bytes(kv_bytes)} of KV cache"
    output.note(f"{settings.name} at {settings.url}: {slots}")
    key = "-H 'Authorization: Bearer '$KEY " if settings.rules.keys else ""
    output.next_step(
        f"curl {key}{settings.url}/v1/completions -H 'Content-Type: application/json' "
        """-d '{"prompt": "Once upon a time"}'"""
    )


@contextlib.contextmanager
def _clients(service: Service, listener: socket.socket, settings: ServeSettings, output: Output) -> Iterator[None]:
    """Answer clients in a thread of its own within the block, and then send what is left."""

    def on_answer(method: str, path: str, status: int, seconds: float) -> None:
        output.note(f"{time.strftime('%H:%M:%S')} {method} {path} {status or 'left'} {seconds * 1000:.0f} ms")

    config = uvicorn.Config(
        build_app(service, rules=settings.rules, on_answer=on_answer),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)

    async def main() -> None:
        warm = asyncio.create_task(service.reader.warm_up())
        await server.serve(sockets=[listener])
        warm.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="clients", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(GRACE_SECONDS + 2)


@contextlib.contextmanager
def _ending(engine: Engine, settings: ServeSettings, output: Output) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM refuses what is new, and the second one ends everything."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # In a thread: the engine's lock may be held by what the signal interrupted.
        end: Callable[[], None] = engine.stop
        if not engine.is_ending:
            output.note(f"ending: running requests have {settings.drain_seconds:g} s; once more ends at once")
            end = lambda: engine.drain(settings.drain_seconds)  # noqa: E731
        threading.Thread(target=end, daemon=True).start()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _status_line(engine: Engine, output: Output) -> Iterator[None]:
    """Show on a terminal what the engine does."""
    ended = threading.Event()

    def watch(say: Callable[[str], None]) -> None:
        before = 0
        while not ended.wait(STATUS_SECONDS):
            seen = engine.counters
            speed, before = (seen.totals.num_new_tokens - before) / STATUS_SECONDS, seen.totals.num_new_tokens
            say(f"{seen.num_running} running, {seen.num_waiting} waiting, {speed:.0f} tokens/s")

    with output.spinner("serving", style="line") as say:
        thread = threading.Thread(target=watch, args=(say,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _limit_writes(listener: socket.socket) -> None:
    """Let the system close connections from here whose other end takes nothing, also what is buffered for them."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * WRITE_SECONDS))


def _allow_connections() -> None:
    """Let as many clients connect as this user may have files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
