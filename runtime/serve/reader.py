"""Prompts become token ids in processes that can be ended, so that no text keeps the server or the model waiting."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from plans.errors import LlamaplanError
from runtime.chat.template import ChatTemplate, Message
from runtime.prepared import Prepared
from runtime.serve.refusals import Refused

NUM_READERS = 4
"""One text that takes as long as it may holds up one of them."""

ResultT = TypeVar("ResultT")


class Reader:
    """Encodes conversations and texts; each of its threads has a process of `runtime.chat.rendering`.

    Args:
        prepared: the model.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._threads = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        self._own = threading.local()
        self._templates: list[ChatTemplate] = []

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for template in self._templates:
            template.__exit__(None, None, None)

    async def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; errors as `Refused`."""
        if not self._prepared.tokenizer.chat_template:
            raise Refused(400, "this model has no chat template: it was not made for conversations", code="no_template")
        return await self._ask(lambda template: template.encode(messages))

    async def text(self, text: str) -> list[int]:
        """Return the token ids of a text; names of special tokens in it are plain text."""
        return await self._ask(lambda template: template.encode_text(text))

    async def warm_up(self) -> None:
        """Start one process, so that the first request need not wait for it."""
        await self.text("x")

    async def _ask(self, encode: Callable[[ChatTemplate], list[int]]) -> list[int]:
        def call() -> list[int]:
            return encode(self._template())

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except LlamaplanError as error:
            raise Refused.of(error) from None

    def _template(self) -> ChatTemplate:
        found: ChatTemplate | None = getattr(self._own, "template", None)
        if found is None:
            found = ChatTemplate(self._prepared.source.folder, vocab_size=self._prepared.vocab_size)
            self._own.template = found
            self._templates.append(found)
        return found
