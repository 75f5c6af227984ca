"""Requests for the engine, and what becomes of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.engine.engine import Engine
from runtime.engine.events import Done, Event, Failed, PromptRead, Token, Usage
from runtime.generate.limits import Limits
from runtime.generate.request import Request
from runtime.generate.sampling import Sampling


@dataclass
class Heard:
    """What the engine told about one request."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Token | Done))

    @property
    def prompt(self) -> list[Any]:
        return [likely for event in self.events if isinstance(event, PromptRead) for likely in event.likely]

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def reason(self) -> str:
        return self.last.finish_reason if isinstance(self.last, Done) else "failed"

    @property
    def is_over(self) -> bool:
        return bool(self.events) and isinstance(self.last, Done | Failed)

    @property
    def usage(self) -> Usage:
        assert isinstance(self.last, Done)
        return self.last.usage

    @property
    def error(self) -> Any:
        assert isinstance(self.last, Failed)
        return self.last.error


def letters(token_ids: Any) -> str:
    """One letter per token."""
    return "".join(chr(ord("A") + token) for token in token_ids)


def ask(prompt: list[int], *, sampling: Sampling | None = None, index: int = 0, **options: Any) -> Request:
    """A request; options are those of `Limits`, `num_top` and `tells_prompt`."""
    told = {name: options.pop(name) for name in ("num_top", "tells_prompt") if name in options}
    limits = Limits(**{"context_tokens": 256, "max_tokens": 12, "prefill_chunk_tokens": 8} | options)
    return Request(prompt_ids=prompt, sampling=sampling or Sampling(), limits=limits, sequence_index=index, **told)


def hear(engine: Engine, *requests: Request, key: str | None = None) -> list[Heard]:
    """Run requests together until all are done."""
    heard = [Heard() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        engine.submit(request, on_event=listener, reuse_key=key)
    engine.run_all()
    return heard


Alone = Callable[[Request], Heard]


Alone = Callable[[Request], Heard]
