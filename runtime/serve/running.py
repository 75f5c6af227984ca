"""A request in the engine: its choices' events, brought from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Self

from plans.errors import LlamaplanError
from runtime.engine.engine import Engine, Ticket
from runtime.engine.events import Done, Event, Failed, PromptRead, Token
from runtime.generate.request import Request
from runtime.serve.answers import FINISH, Choice
from runtime.serve.refusals import Refused

Told = PromptRead | Token | Done
"""What a request that goes well consists of."""


DELIVERY_SECONDS = 0.002
"""What the engine needs of the interpreter between two steps of many sequences."""


class Mailbox:
    """Brings calls from the engine's thread to the event loop, once for all calls of a step.

    They come a moment late: while the engine makes its next step ready both would wait for the interpreter, turn by
    turn; afterwards native code computes without it.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._is_waking = False

    def put(self, call: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Let `loop`, always the same, make a call; from any thread.

        Raises:
            RuntimeError: the loop has ended.
        """
        self._calls.append(call)
        if not self._is_waking:
            self._is_waking = True
            loop.call_soon_threadsafe(loop.call_later, DELIVERY_SECONDS, self._deliver)

    def _deliver(self) -> None:
        self._is_waking = False  # before the calls: whatever comes after the last of them wakes the loop again
        while self._calls:
            self._calls.popleft()()


class Running:
    """Submits requests together, and gives up whatever is not done when the block is left.

    Args:
        engine: who runs them.
        mailbox: how events come from its thread.
        choices: what is made of each request.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox, choices: Sequence[Choice]) -> None:
        self._engine, self._mailbox, self._choices = engine, mailbox, choices
        self._events: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def submit(self, requests: Sequence[Request], *, reuse_key: str | None) -> Self:
        """Hand one request per choice to the engine.

        Raises:
            Refused: one of them can never run, or too many wait.
        """
        loop = asyncio.get_running_loop()
        for choice, request in zip(self._choices, requests, strict=True):

            def tell(event: Event, choice: Choice = choice) -> None:
                with contextlib.suppress(RuntimeError):  # the server has ended
                    self._mailbox.put(partial(self._events.put_nowait, (choice, event)), loop)

            try:
                self._tickets.append(self._engine.submit(request, on_event=tell, reuse_key=reuse_key))
            except LlamaplanError as error:
                self.cancel()
                raise Refused.of(error) from None
        return self

    def cancel(self) -> None:
        """Give up everything; what is done already is not touched."""
        for ticket in self._tickets:
            ticket.cancel()

    async def events(self) -> AsyncGenerator[tuple[Choice, Told]]:
        """Yield what happens until all choices are done, and bring the choices up to it.

        Raises:
            Refused: something failed, or the server is ending.
        """
        left = len(self._choices)
        try:
            while left:
                choice, event = await self._events.get()
                if isinstance(event, Failed):
                    raise Refused.of(event.error)
                _take(choice, event)
                left -= isinstance(event, Done)
                yield choice, event
        finally:
            self.cancel()


def _take(choice: Choice, event: Told) -> None:
    if isinstance(event, PromptRead):
        choice.likely += [None, *event.likely] if not choice.likely else event.likely
        return
    choice.pieces.append(event.text)
    if isinstance(event, Token):
        choice.likely += [] if event.likely is None else [event.likely]
        return
    if event.finish_reason not in FINISH:
        raise Refused(503, "the server is ending", code="shutting_down")
    choice.finish_reason, choice.usage = FINISH[event.finish_reason], event.usage
