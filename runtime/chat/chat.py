"""Answers in a conversation: the cache is kept between turns, and Ctrl-C ends an answer, not the program."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

from plans.errors import UsageError
from plans.run import FinishReason
from runtime.chat.conversation import Conversation
from runtime.chat.template import ChatTemplate
from runtime.engine.engine import Engine
from runtime.engine.heard import Heard
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling
from runtime.reading.capacity import memory_faults
from runtime.session import AnySession

_MINE = "chat"
"""Whose caches are kept: there is one conversation."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        text: what was said; partial if the reason is `interrupted`.
        finish_reason: why it ended.
        num_tokens: its tokens.
        num_context_tokens: prompt and answer together.
        is_context_full: whether it ended because the context did.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    num_context_tokens: int
    is_context_full: bool


@dataclass(slots=True)
class ChatNumbers:
    """What a chat has cost so far."""

    num_answers: int = 0
    num_prompt_tokens: int = 0
    num_read_tokens: int = 0
    """Prompt tokens that were not in the cache."""
    num_new_tokens: int = 0
    num_decode_steps: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)

    def add(self, heard: Heard) -> None:
        """Count one answer."""
        assert heard.usage is not None
        self.num_answers += 1
        self.num_prompt_tokens += heard.usage.num_prompt_tokens
        self.num_read_tokens += heard.usage.num_prompt_tokens - heard.usage.num_cached_tokens
        self.num_new_tokens += heard.usage.num_new_tokens
        self.num_decode_steps += len(heard.step_seconds)
        self.decode_seconds += sum(heard.step_seconds)
        self.first_token_seconds.append(heard.first_token_seconds)


class Chat:
    """A conversation with a model.

    Args:
        session: the model.
        template: its chat template.
        conversation: how it starts.
        sampling: how answers are chosen; every answer has random draws of its own.
        max_tokens: tokens per answer; None until the model ends it or the context is full.
        stop_strings: strings that end an answer.
        prefill_chunk_tokens: prompt tokens per step.
    """

    def __init__(
        self,
        session: AnySession,
        *,
        template: ChatTemplate,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int | None = None,
        stop_strings: tuple[str, ...] = (),
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        self.conversation = conversation
        self.numbers = ChatNumbers()
        self._session, self._template = session, template
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop_strings = stop_strings
        self._chunk_tokens = prefill_chunk_tokens
        self._engine = Engine(session)

    def send(self, text: str, *, on_text: Callable[[str], None]) -> Answer | None:
        """Say something and return the answer, which becomes part of the conversation.

        If there is none - an error, or Ctrl-C before it began - the message is taken back.

        Args:
            text: what the user says.
            on_text: receives the answer piece by piece.

        Returns:
            The answer, or None if Ctrl-C came before its first token.

        Raises:
            UsageError: the conversation does not fit the context; with the numbers.
            InputError: the chat template refuses the conversation.
        """
        turns = self.conversation.turns
        turns.append(text)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        answer: Answer | None
        try:
            with Stopper() as stopper:
                answer = self._answer(keep, stopper)
        except KeyboardInterrupt:
            self._engine.abandon()
            answer = Answer("".join(pieces), "interrupted", 0, 0, is_context_full=False) if pieces else None
        except BaseException:
            turns.pop()
            raise
        if answer is None:
            turns.pop()
        else:
            turns.append(answer.text)
        return answer

    def _answer(self, on_text: Callable[[str], None], stopper: "Stopper") -> Answer:
        prepared = self._session.prepared
        ids = self._template.encode(self.conversation.messages)
        room = prepared.context_tokens - len(ids)
        if room < 1:
            raise _context_is_full(len(ids), prepared.context_tokens)
        limits = prepared.limits(
            max_tokens=None if self._max_tokens is None else min(self._max_tokens, room),
            stop_strings=self._stop_strings,
            prefill_chunk_tokens=self._chunk_tokens,
        )
        request = Request(
            prompt_ids=ids, sampling=self._sampling, limits=limits, sequence_index=self.numbers.num_answers
        )
        heard = Heard(on_text)
        with memory_faults("answering"):
            ticket = self._engine.submit(request, on_event=heard, reuse_key=_MINE)
            while not self._engine.is_idle:
                self._engine.step()
                if stopper.should_stop():
                    ticket.cancel()
        sequence = heard.sequence()
        self.numbers.add(heard)
        is_full = sequence.finish_reason == "length" and len(sequence.token_ids) == room
        length = len(ids) + len(sequence.token_ids)
        return Answer(sequence.text, sequence.finish_reason, len(sequence.token_ids), length, is_full)


class Stopper:
    """While the block runs, Ctrl-C ends the answer after the current token, or at once if there is none yet."""

    def __init__(self) -> None:
        self._has_begun = False
        self._is_asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def should_stop(self) -> bool:
        """Whether Ctrl-C was pressed; called after every token."""
        self._has_begun = True
        return self._is_asked

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_asked or not self._has_begun:
            raise KeyboardInterrupt
        self._is_asked = True


def _context_is_full(num_tokens: int, context_tokens: int) -> UsageError:
    return UsageError(
        f"the conversation has {num_tokens} tokens, the context holds {context_tokens} and an answer needs at least 1",
        hint="take turns back with /undo, start anew with /reset, or run again with a larger --ctx-size",
        code="E-CONTEXT",
    )
