"""Turn a conversation into token ids with the checkpoint's own chat template, which nobody has to trust.

A template is a program. Its sandbox keeps it from the machine but not from using it up, and no alarm interrupts one
long operation: so it runs in a process of its own, `runtime.chat.rendering`, which is bounded and ended from outside.
Text that a person wrote never becomes a special token: it is encoded as plain text.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from plans.commands.children import python_command
from plans.errors import InputError, MachineError, PeerError
from runtime.distributed.control.channel import receive_frame, send_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 5.0
"""What one conversation may take; a long one takes hundredths of a second."""
START_SECONDS = 60.0
MAX_BYTES = 1 << 30
"""Address space of the process, tokenizer and libraries included."""
MAX_OUTPUT_CHARACTERS = 16 << 20
MAX_REPLY_BYTES = 64 << 20

Message = Mapping[str, str]
"""`role` and `content`."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Every thread of a library reserves address space, which is bounded."""


class ChatTemplate:
    """The chat template of a checkpoint, in a process that is started when it is first needed and then kept.

    Use it as a context manager: the process ends with the block.

    Args:
        folder: holds the tokenizer and the template.
        vocab_size: rows of the embedding.
    """

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        self._child: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to where the next answer begins.

        Raises:
            InputError: the template fails, takes too long, needs too much memory, or writes too much.
            MachineError: its process does not start.
        """
        return self._encode([dict(message) for message in messages])

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, as `encode_prompt` does; errors as `encode`."""
        return self._encode(text)

    def _encode(self, asked: list[dict[str, str]] | str) -> list[int]:
        try:
            _, connection = self._child = self._child or self._start()
            return self._ask(connection, asked)
        except InputError:
            raise
        except BaseException:  # Ctrl-C, too: whatever the process is doing, nobody waits for it any longer
            self._end()
            raise

    def _ask(self, connection: socket.socket, asked: list[dict[str, str]] | str) -> list[int]:
        connection.settimeout(MAX_SECONDS)
        try:
            send_frame(connection, json.dumps(asked).encode())
            data = receive_frame(connection, max_bytes=MAX_REPLY_BYTES)
        except TimeoutError:
            self._end()
            raise broken(f"takes longer than {MAX_SECONDS:g} s") from None
        except PeerError:
            self._end()
            raise broken("writes too much", expected=f"at most {MAX_REPLY_BYTES} bytes") from None
        except OSError:
            data = None
        if data is None:
            raise broken(f"needs more than {MAX_BYTES >> 20} MiB, or crashes: its process {self._last_words()}")
        reply: dict[str, Any] = json.loads(data)
        if "ids" not in reply:
            raise InputError(**reply)
        ids: list[int] = reply["ids"]
        return ids

    def _start(self) -> tuple["subprocess.Popen[bytes]", socket.socket]:
        ours, theirs = socket.socketpair()
        words = [str(self._folder.absolute()), self._vocab_size, theirs.fileno(), os.getpid()]
        with theirs:
            process = subprocess.Popen(
                python_command("runtime.chat.rendering", *map(str, words)),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process, which ends that one
                env={**os.environ, **_ONE_THREAD},
            )
        self._child = process, ours
        ours.settimeout(START_SECONDS)
        try:
            is_ready = receive_frame(ours, max_bytes=MAX_REPLY_BYTES) is not None
        except OSError:
            is_ready = False
        if not is_ready:
            raise MachineError(f"the process that renders chat templates did not start: it {self._last_words()}")
        return self._child

    def _end(self) -> None:
        """End the process, whatever it is doing."""
        child, self._child = self._child, None
        if child is not None:
            process, connection = child
            connection.close()
            process.kill()
            process.wait()

    def _last_words(self) -> str:
        """Return how the process ended, which has closed its end of the connection."""
        assert self._child is not None
        process, _ = self._child
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        self._end()
        code = process.returncode
        return f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def check_template(template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase", *, folder: Path) -> None:
    """Require a chat template that renders a short conversation.

    Raises:
        InputError: there is none, or it does not work.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "this model has no chat template",
            where=folder,
            hint="it was not made for conversations; continue a text with llamarun generate",
            code="E-TEMPLATE",
        )
    template.encode([{"role": "user", "content": "x"}])


def special_tokens_in(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[str]:
    """Return the special tokens whose names occur in the messages' text."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(name for name in names if any(name in message["content"] for message in messages))


def broken(what: str, *, expected: str = "") -> InputError:
    """Return the error of a template that does not work."""
    return InputError(what, where="chat template", expected=expected, code="E-TEMPLATE")
