"""One sequence while it grows: its tokens, its text, and why it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plans.run import FinishReason
from runtime.generate.text import Decode, StopMatcher, TextStream

OnText = Callable[[int, str], None]
"""Called with the sequence index and its next piece of text."""


@dataclass(frozen=True, slots=True)
class GeneratedSequence:
    """One finished sequence."""

    token_ids: tuple[int, ...]
    """New tokens, the end-of-sequence token included."""
    text: str
    """Decoded new tokens up to (not including) a stop string; empty when no `decode` was given."""
    finish_reason: FinishReason


class SequenceWriter:
    """Collects the new tokens of one sequence and decides when it is finished.

    Args:
        index: position of the sequence in the request.
        prompt_ids: what the sequence continues.
        max_tokens: new tokens at most.
        eos_token_ids: tokens that end it.
        stop_strings: strings that end it and are not part of its text.
        is_stop: whether all ids so far, prompt included, end with a stop string that text does not show.
        decode: token ids -> text, or None to collect tokens only.
        on_text: receives text as soon as it is certain.
    """

    def __init__(
        self,
        index: int,
        *,
        prompt_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: frozenset[int],
        stop_strings: Sequence[str],
        is_stop: Callable[[Sequence[int]], bool] | None,
        decode: Decode | None,
        on_text: OnText | None,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None if max_tokens > 0 else "length"
        self._max_tokens = max_tokens
        self._eos_token_ids = eos_token_ids
        self._stream = None if decode is None else TextStream(decode, prompt_ids=prompt_ids)
        self._is_stop, self._prompt_ids = is_stop, prompt_ids
        self._stops = StopMatcher(stop_strings)
        self._on_text = on_text
        self._pieces: list[str] = []

    @property
    def is_finished(self) -> bool:
        """Whether nothing more is added."""
        return self.finish_reason is not None

    def add(self, token_id: int) -> None:
        """Add a token, print what became certain, and notice the end."""
        self.token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self._finish("eos")
            return
        if self._stream is not None:
            self._show(self._stops.push(self._stream.push(token_id)))
        if self._stops.is_stopped:
            self.finish_reason = "stop_string"
        elif self._is_stop is not None and self._is_stop([*self._prompt_ids, *self.token_ids]):
            self._finish("stop_string")
        elif len(self.token_ids) >= self._max_tokens:
            self._finish("length")

    def interrupt(self) -> None:
        """End the sequence where it is, unless it is finished."""
        if not self.is_finished:
            self._finish("interrupted")

    def result(self) -> GeneratedSequence:
        """Return the finished sequence."""
        assert self.finish_reason is not None
        return GeneratedSequence(tuple(self.token_ids), "".join(self._pieces), self.finish_reason)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._stream is not None:
            self._show(self._stops.push(self._stream.finish()) + self._stops.finish())

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(self.index, piece)
