"""Who may ask at all: host, origin, key and size are looked at before anything else of a request.

A page in somebody's browser can reach an address of this machine too. The Host header keeps away pages that have
renamed it (DNS rebinding), Origin all others, and the key whoever has none.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.refusals import Refused

MAX_BODY_BYTES = 8 << 20
BODY_SECONDS = 60.0
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/health"})
"""Whoever watches the server needs no key."""

OnAnswer = Callable[[str, str, int, float], None]
"""Told method, path, status and seconds of every request."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may ask.

    Attributes:
        hosts: what the Host header may name, without a port.
        origins: pages that may ask from a browser.
        keys: one of them must be there; none for everybody.
    """

    hosts: Collection[str]
    origins: Collection[str] = ()
    keys: Sequence[bytes] = ()


class Guard:
    """Lets requests through to `app` that keep the rules, with their whole body."""

    def __init__(self, app: ASGIApp, *, rules: Rules, on_answer: OnAnswer) -> None:
        self._app, self._rules, self._on_answer = app, rules, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        headers, started = Headers(scope=scope), time.perf_counter()
        origin = headers.get("origin")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if origin is not None and origin in self._rules.origins:
                    message["headers"] = [*message["headers"], *_cors(origin)]
            await send(message)

        try:
            scope["reuse_key"] = self._check(scope, headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await Response(status_code=204)(scope, receive, answer)
            else:
                await self._app(scope, await _with_body(headers, receive), answer)
        except Refused as refused:
            await refused.response()(scope, receive, answer)
        finally:
            self._on_answer(scope["method"], scope["path"], status, time.perf_counter() - started)

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Return the key that was given; "" where none is needed."""
        rules = self._rules
        if _without_port(headers.get("host", "")) not in rules.hosts:
            raise Refused(403, "the Host header names another server; see --allow-host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and origin not in rules.origins:
            raise Refused(403, "pages of that origin may not ask; see --allow-origin", code="origin_not_allowed")
        is_preflight = scope["method"] == "OPTIONS" and origin is not None
        if not rules.keys or scope["path"] in OPEN_PATHS or is_preflight:
            return ""
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1", "replace")
        matches = [hmac.compare_digest(given, key) for key in rules.keys]
        if not any(matches):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        return f"key {matches.index(True)}"


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"vary", b"Origin"),
    ]


async def _with_body(headers: Headers, receive: Receive) -> Receive:
    """Read the body, and return what hands it out and then waits for the client to leave."""
    stated = headers.get("content-length", "0")
    if not stated.isdigit() or int(stated) > MAX_BODY_BYTES:
        raise _too_large()
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    break
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:.0f} s", code="body_too_slow") from None
    whole: list[Any] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def next_message() -> Message:
        message: Message = whole.pop() if whole else await receive()
        return message

    return next_message


def _too_large() -> Refused:
    return Refused(413, f"the body has more than {MAX_BODY_BYTES} bytes", code="body_too_large")
