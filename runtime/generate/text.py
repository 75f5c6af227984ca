"""Text while it is generated: whole characters only, and stop strings that may cross token edges."""

from collections.abc import Callable, Sequence

from plans.errors import UsageError

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, such as a tokenizer's `decode` with `skip_special_tokens=True`."""

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
WINDOW_TOKENS = 64


class TextStream:
    """Turns token ids into text, piece by piece, without ever printing half a character.

    A byte-level token can end inside a character; decoding then ends in U+FFFD, which is held back until the next
    tokens complete it. Only a window of recent tokens is decoded again, so that a step's cost does not grow.

    Args:
        decode: turns token ids into text.
        prompt_ids: what the text continues; decides, for example, whether a first space is printed.
    """

    def __init__(self, decode: Decode, *, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0
        if prompt_ids:
            self._slide(prompt_ids)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain (often a word, sometimes nothing)."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._num_shown :]
        self._num_shown = max(self._num_shown, len(whole))
        if whole == text and len(self._window) > WINDOW_TOKENS:
            self._slide(self._window)
        return piece

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character show as U+FFFD."""
        return self._decode(self._window)[self._num_shown :] if self._window else ""

    def _slide(self, token_ids: Sequence[int]) -> None:
        """Keep only the last tokens, starting at a whole character (one has at most 4 bytes, so 4 tokens)."""
        for length in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):
            window = list(token_ids[-length:])
            text = self._decode(window)
            if not text.startswith(REPLACEMENT):
                self._window, self._num_shown = window, len(text)
                return


class StopMatcher:
    """Cuts text at the stop string that is complete first, holding back whatever could still become one.

    Where text is cut does not depend on the pieces it arrives in.

    Args:
        stop_strings: strings that end the text; they are not part of it.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise UsageError("a stop string is empty", expected="at least one character", code="E-STOP")
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.is_stopped = False

    def push(self, piece: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop_strings)), 0)
