"""Lines for a chat: from a person at a terminal, or from a pipe."""

import contextlib
import sys
from typing import Any

from plans.errors import UsageError

PROMPT = "> "


class LineReader:
    """Reads lines from stdin; only a person at a terminal sees a prompt, with line editing where Python has it."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._readline: Any = None
        if self.is_terminal and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline

                self._readline = readline

    def read(self, *, suggestion: str = "") -> str | None:
        """Return the next line without its end, or None when there are no more.

        Raises:
            InputError: a line that is not UTF-8, holds NUL, or is too long.
            UsageError: what was typed is not Unicode text.
        """
        if not self.is_terminal:
            return self._read_pipe()
        if self._readline is None:
            sys.stderr.write(PROMPT)
            sys.stderr.flush()
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        return self._ask(suggestion)

    def _ask(self, suggestion: str) -> str | None:
        self._readline.set_startup_hook(lambda: self._readline.insert_text(suggestion))
        try:
            line = input(PROMPT)
        except EOFError:
            return None
        finally:
            self._readline.set_startup_hook()
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise UsageError("the line is not UTF-8", hint="check the terminal's encoding", code="E-PROMPT")
        return line

    def _read_pipe(self) -> str | None:
        from runtime.reading.tokenizer import MAX_PROMPT_BYTES, read_prompt

        data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 2)
        return read_prompt(data.rstrip(b"\r\n"), where="stdin") if data else None
