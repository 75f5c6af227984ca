"""The endpoints."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.engine.engine import Engine
from runtime.engine.events import PromptRead, Token
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.prepared import Prepared
from runtime.serve.answers import ChatForm, Choice, Document, TextForm, usage_document
from runtime.serve.guard import Guard, OnAnswer, Rules
from runtime.serve.metrics import EngineMetrics
from runtime.serve.reader import Reader
from runtime.serve.refusals import Refused
from runtime.serve.requests import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Settings,
    TokenizeRequest,
    read_request,
)
from runtime.serve.running import Mailbox, Running

WRITE_SECONDS = 60.0
"""A client that takes nothing for so long is left."""

Events = AsyncGenerator[Document]
Handle = Callable[[bytes, str], Awaitable["Response | Events"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the endpoints work with.

    Attributes:
        prepared: the model.
        engine: who runs it.
        reader: who turns text into token ids.
        name: what clients call the model.
        has_reuse: whether the beginning of a prompt may be taken over from an earlier request with the same key.
        chunk_tokens: prompt tokens per step.
        mailbox: how the engine's thread tells what happens.
    """

    prepared: Prepared
    engine: Engine
    reader: Reader
    name: str
    has_reuse: bool
    chunk_tokens: int | None
    mailbox: Mailbox = field(default_factory=Mailbox)

    async def chat(self, body: bytes, key: str) -> Response | Events:
        """`POST /v1/chat/completions`."""
        asked = read_request(ChatRequest, body)
        self._check_model(asked.model)
        ids = await self.reader.conversation([message.plain() for message in asked.messages])
        return await self._answer(asked, ChatForm, "chatcmpl", [(ids, "")], key=key)

    async def completions(self, body: bytes, key: str) -> Response | Events:
        """`POST /v1/completions`."""
        asked = read_request(CompletionRequest, body)
        self._check_model(asked.model)
        prompts = []
        for prompt in asked.prompts:
            ids = await self.reader.text(prompt) if isinstance(prompt, str) else list(prompt)
            echo = "" if not asked.echo else prompt if isinstance(prompt, str) else self._text(ids)
            prompts.append((ids, echo))
        return await self._answer(asked, TextForm, "cmpl", prompts, key=key)

    async def tokenize(self, body: bytes, _key: str) -> Response:
        """`POST /tokenize`."""
        asked = read_request(TokenizeRequest, body)
        self._check_model(asked.model)
        ids = await self.reader.text(asked.prompt)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.prepared.context_tokens})

    async def detokenize(self, body: bytes, _key: str) -> Response:
        """`POST /detokenize`."""
        asked = read_request(DetokenizeRequest, body)
        self._check_model(asked.model)
        if max(asked.tokens) >= self.prepared.vocab_size:
            largest = self.prepared.vocab_size - 1
            raise Refused(400, f"tokens: the largest id is {largest}", code="invalid_value", param="tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self._text, list(asked.tokens))})

    async def models(self, _request: HttpRequest) -> Response:
        """`GET /v1/models`."""
        shown = {"id": self.name, "object": "model", "created": 0, "owned_by": "llamarun"}
        return JSONResponse({"object": "list", "data": [{**shown, "max_model_len": self.prepared.context_tokens}]})

    async def health(self, _request: HttpRequest) -> Response:
        """`GET /health`."""
        is_well = self.engine.fault is None and not self.engine.is_ending
        return JSONResponse({"status": "ok" if is_well else "ending"}, status_code=200 if is_well else 503)

    async def metrics(self, _request: HttpRequest) -> Response:
        """`GET /metrics`."""
        return Response(EngineMetrics(self.engine).text(), media_type="text/plain; version=0.0.4")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refused(404, f"the model here is called {self.name}", code="model_not_found", param="model")

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.prepared.tokenizer.decode(list(ids)))

    async def _answer(
        self,
        asked: ChatRequest | CompletionRequest,
        form_class: type[ChatForm] | type[TextForm],
        prefix: str,
        prompts: Sequence[tuple[list[int], str]],
        *,
        key: str,
    ) -> Response | Events:
        num = asked.n or 1
        if num * len(prompts) > MAX_CHOICES:
            raise Refused(400, f"n x prompts: at most {MAX_CHOICES}", code="invalid_value", param="n")
        form = form_class(
            prefix,
            model=self.name,
            token_text=lambda token_id: self._text([token_id]),
            has_logprobs=asked.num_top is not None,
        )
        requests = self._requests(asked, [ids for ids, _echo in prompts])
        choices = [Choice(i, echo=prompts[i // num][1]) for i in range(len(requests))]
        running = Running(self.engine, self.mailbox, choices)
        running.submit(requests, reuse_key=key if self.has_reuse else None)
        if asked.stream:
            return _stream(running, form, choices, tells_usage=asked.tells_usage, num_per_prompt=num)
        async with aclosing(running.events()) as events:
            async for _ in events:
                pass
        return JSONResponse(form.whole(choices, usage_document(choices, num_per_prompt=num)))

    def _requests(self, asked: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[Request]:
        sampling = self._sampling(asked)
        limits = self.prepared.limits(
            max_tokens=asked.num_new_tokens,
            stop_strings=asked.stop_strings,
            prefill_chunk_tokens=self.chunk_tokens,
            ignores_eos=bool(asked.ignore_eos),
        )
        tells_prompt = isinstance(asked, CompletionRequest) and bool(asked.echo) and asked.num_top is not None
        return [
            Request(
                prompt_ids=ids,
                sampling=sampling,
                limits=limits,
                sequence_index=index,
                num_top=asked.num_top,
                tells_prompt=tells_prompt,
            )
            for ids in prompts
            for index in range(asked.n or 1)
        ]

    def _sampling(self, asked: Settings) -> Sampling:
        """Return the checkpoint's settings with the request's on top; draws that nobody gave a seed differ."""
        names = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
        given: dict[str, Any] = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
        if asked.top_k is not None:
            given["top_k"] = max(asked.top_k, 0)  # -1 is how others say "all"
        if given.get("top_k", 0) > self.prepared.vocab_size:
            raise Refused(400, "top_k: more than the vocabulary has", code="invalid_value", param="top_k")
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        if any(token >= self.prepared.vocab_size for token in bias):
            raise Refused(400, "logit_bias: a token is not in the vocabulary", code="invalid_value", param="logit_bias")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
        defaults = Sampling.from_generation_config(self.prepared.generation_config)
        return replace(defaults, **given, logit_bias=bias, seed=seed)


async def _stream(
    running: Running,
    form: ChatForm | TextForm,
    choices: Sequence[Choice],
    *,
    tells_usage: bool,
    num_per_prompt: int,
) -> Events:
    more: Document = {"usage": None} if tells_usage else {}
    begun: set[int] = set()

    def beginning(choice: Choice) -> list[Document]:
        if choice.index in begun:
            return []
        begun.add(choice.index)
        first = form.beginning(choice)
        return [] if first is None else [first | more]

    try:
        async with aclosing(running.events()) as events:
            async for choice, event in events:
                if isinstance(event, PromptRead):
                    continue  # told with the beginning
                token_likely = event.likely if isinstance(event, Token) else None
                told = choice.likely[-1:] if token_likely is not None else []
                del choice.likely[len(choice.likely) - len(told) :]
                for document in beginning(choice):
                    yield document
                if isinstance(event, Token) or event.text:
                    reason, choice.finish_reason = choice.finish_reason, None
                    yield form.piece(choice, event.text, told) | more
                    choice.finish_reason = reason
                if not isinstance(event, Token):
                    yield form.ending(choice) | more
        if tells_usage:
            yield form.numbers(usage_document(choices, num_per_prompt=num_per_prompt))
    except Refused as refused:
        yield refused.document()


class Endpoint:
    """Runs what answers a request, and ends it as soon as the client has left."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["method"] != "POST":
            raise HTTPException(405)
        body = await HttpRequest(scope, receive).body()
        work = asyncio.create_task(self._work(scope, body, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _work(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        answer = await self._handle(body, scope["reuse_key"])
        if isinstance(answer, Response):
            await answer(scope, receive, send)
        else:
            await _send_events(answer, send)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_events(events: Events, send: Send) -> None:
    """Send server-sent events; each ends with an empty line, and the last one is `[DONE]`."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async with aclosing(events) as documents:
            async for document in documents:
                data = json.dumps(document, ensure_ascii=False).encode()
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    except TimeoutError:  # it reads nothing; the connection is closed because the answer has no end
        return


async def _wrong_path(_request: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    what = "that method is not for this path" if status == 405 else "there is nothing at this path"
    return Refused(status, what, code="not_found" if status == 404 else "wrong_method").response()


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


def build_app(service: Service, *, rules: Rules, on_answer: OnAnswer) -> ASGIApp:
    """Return everything behind the guard."""
    posts = {
        "/v1/chat/completions": service.chat,
        "/v1/completions": service.completions,
        "/tokenize": service.tokenize,
        "/detokenize": service.detokenize,
    }
    gets = {"/v1/models": service.models, "/health": service.health, "/metrics": service.metrics}
    routes = [Route(path, Endpoint(handle)) for path, handle in posts.items()]
    routes += [Route(path, get, methods=["GET"]) for path, get in gets.items()]
    handlers: Any = {HTTPException: _wrong_path, Refused: _refused}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), rules=rules, on_answer=on_answer)
