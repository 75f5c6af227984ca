"""What became of a request, collected until it is done."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from plans.errors import LlamaplanError
from plans.run import FinishReason
from runtime.engine.events import Done, Event, Failed, Token, Usage
from runtime.generate.writer import GeneratedSequence


@dataclass(slots=True)
class Heard:
    """Listens to what the engine tells about one request.

    Attributes:
        on_text: receives text as soon as it is certain.
        token_ids: new tokens.
        first_token_seconds: from the making of this object to the first token.
        step_seconds: from each token to the next.
        usage: its tokens; None while it is not done.
    """

    on_text: Callable[[str], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    first_token_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    usage: Usage | None = None
    _reason: FinishReason | None = None
    _error: LlamaplanError | None = None
    _pieces: list[str] = field(default_factory=list)
    _heard: float = field(default_factory=time.perf_counter)

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, Token):
            self._note_time()
            self.token_ids.append(event.token_id)
        if isinstance(event, Token | Done) and event.text:
            self._pieces.append(event.text)
            if self.on_text is not None:
                self.on_text(event.text)
        if isinstance(event, Done):
            self.usage, self._reason = event.usage, event.finish_reason
        elif isinstance(event, Failed):
            self._error = event.error

    @property
    def has_failed(self) -> bool:
        """Whether there will be no result."""
        return self._error is not None

    def sequence(self) -> GeneratedSequence:
        """Return what was generated.

        Raises:
            LlamaplanError: what it failed with.
        """
        if self._error is not None:
            raise self._error
        assert self._reason is not None
        return GeneratedSequence(tuple(self.token_ids), "".join(self._pieces), self._reason)

    def _note_time(self) -> None:
        before, self._heard = self._heard, time.perf_counter()
        if self.token_ids:
            self.step_seconds.append(self._heard - before)
        else:
            self.first_token_seconds = self._heard - before
