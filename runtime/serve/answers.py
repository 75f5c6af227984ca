"""What a client gets, in OpenAI's documents: whole, or an event per token."""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.engine.events import Usage
from runtime.steps.parts import Likely

Document = dict[str, Any]
TokenText = Callable[[int], str]

FINISH = {"eos": "stop", "stop_string": "stop", "length": "length"}
"""OpenAI's words for how a sequence ended."""


@dataclass(slots=True)
class Choice:
    """One text of an answer while it grows.

    Attributes:
        index: its place in the answer.
        echo: the prompt, where it is repeated.
        pieces: its text so far.
        likely: how likely its tokens were, the prompt's first where those were asked for too; None is the very first.
        finish_reason: why it ended.
        usage: its tokens.
    """

    index: int
    echo: str = ""
    pieces: list[str] = field(default_factory=list)
    likely: list[Likely | None] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None


class Form:
    """What the documents of one request have in common."""

    name = ""

    def __init__(self, prefix: str, *, model: str, token_text: TokenText, has_logprobs: bool) -> None:
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._token_text, self._has_logprobs = token_text, has_logprobs

    def _document(self, kind: str, choices: list[Document], **more: Any) -> Document:
        return {**self._common, "object": kind, "choices": choices, **more}

    def _tops(self, likely: Likely) -> list[tuple[str, float]]:
        return [(self._token_text(token_id), logprob) for token_id, logprob in likely.top]


class ChatForm(Form):
    """Documents of `/v1/chat/completions`."""

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """Return the whole answer."""
        return self._document("chat.completion", [self._whole(choice) for choice in choices], usage=usage)

    def beginning(self, choice: Choice) -> Document | None:
        """Return what comes before the first token."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, ())

    def piece(self, choice: Choice, text: str, likely: Sequence[Likely | None]) -> Document:
        """Return an event for a token."""
        return self._chunk(choice, {"content": text}, likely)

    def ending(self, choice: Choice) -> Document:
        """Return the last event of a choice."""
        return self._chunk(choice, {}, ())

    def numbers(self, usage: Document) -> Document:
        """Return the event with the numbers of tokens."""
        return self._document("chat.completion.chunk", [], usage=usage)

    def _whole(self, choice: Choice) -> Document:
        message = {"role": "assistant", "content": "".join(choice.pieces), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.likely),
            "finish_reason": choice.finish_reason,
        }

    def _chunk(self, choice: Choice, delta: Document, likely: Sequence[Likely | None]) -> Document:
        shown = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(likely) if likely else None,
            "finish_reason": choice.finish_reason,
        }
        return self._document("chat.completion.chunk", [shown])

    def _logprobs(self, likely: Iterable[Likely | None]) -> Document | None:
        if not self._has_logprobs:
            return None
        rows = [
            _row(self._token_text(one.token_id), one.logprob)
            | {"top_logprobs": [_row(text, logprob) for text, logprob in self._tops(one)]}
            for one in likely
            if one is not None
        ]
        return {"content": rows, "refusal": None}


def _row(text: str, logprob: float) -> Document:
    # A part of a character has no text of its own.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextForm(Form):
    """Documents of `/v1/completions`."""

    def whole(self, choices: Sequence[Choice], usage: Document) -> Document:
        """Return the whole answer."""
        shown = [self._choice(c, c.echo + "".join(c.pieces), c.likely, offset=0) for c in choices]
        return self._document("text_completion", shown, usage=usage)

    def beginning(self, choice: Choice) -> Document | None:
        """Return what comes before the first token: the prompt, where it is repeated."""
        if not choice.echo:
            return None
        return self._document("text_completion", [self._choice(choice, choice.echo, choice.likely, offset=0)])

    def piece(self, choice: Choice, text: str, likely: Sequence[Likely | None]) -> Document:
        """Return an event for a token."""
        offset = len(choice.echo) + sum(map(len, choice.pieces)) - len(text) if self._has_logprobs else 0
        return self._document("text_completion", [self._choice(choice, text, likely, offset=offset)])

    def ending(self, choice: Choice) -> Document:
        """Return the last event of a choice."""
        return self._document("text_completion", [self._choice(choice, "", (), offset=0)])

    def numbers(self, usage: Document) -> Document:
        """Return the event with the numbers of tokens."""
        return self._document("text_completion", [], usage=usage)

    def _choice(self, choice: Choice, text: str, likely: Sequence[Likely | None], *, offset: int) -> Document:
        shown = self._logprobs(choice, likely, offset=offset) if self._has_logprobs and likely else None
        return {"index": choice.index, "text": text, "logprobs": shown, "finish_reason": choice.finish_reason}

    def _logprobs(self, choice: Choice, likely: Sequence[Likely | None], *, offset: int) -> Document:
        tokens = [choice.echo[:0] if one is None else self._token_text(one.token_id) for one in likely]
        offsets = [offset]
        for text in tokens:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else one.logprob for one in likely],
            "top_logprobs": [None if one is None else self._table(one) for one in likely],
            "text_offset": offsets[:-1],
        }

    def _table(self, likely: Likely) -> dict[str, float]:
        """Return the likeliest tokens by their text, and the chosen one; of two with one text the likelier counts."""
        chosen = (self._token_text(likely.token_id), likely.logprob)
        return dict(sorted([*self._tops(likely), chosen], key=lambda one: one[1]))


def usage_document(choices: Sequence[Choice], *, num_per_prompt: int) -> Document:
    """Return the numbers of tokens; a prompt counts once, however many answers it got."""
    used = [choice.usage for choice in choices if choice.usage is not None]
    prompts = used[::num_per_prompt]
    read = sum(usage.num_prompt_tokens for usage in prompts)
    new = sum(usage.num_new_tokens for usage in used)
    cached = sum(usage.num_cached_tokens for usage in prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
