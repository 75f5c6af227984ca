"""The text that weights are calibrated on, as token ids in windows of one length."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plans.errors import InputError
from plans.export.manifest import CalibrationText
from plans.reading.files import read_limited

MAX_TEXT_BYTES = 64 << 20
WINDOW_TOKENS = 512
MAX_TOKENS = 8192
"""Time grows with them; twice as many would make the error a tenth smaller."""
FEW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Text:
    """A text, cut into windows; each is read on its own."""

    windows: tuple[tuple[int, ...], ...]
    record: CalibrationText


def read_text(path: Path, *, folder: Path, vocab_size: int, context_tokens: int) -> Text:
    """Read a text and make tokens of windows from all over it; of a short one, of its beginning.

    Args:
        path: UTF-8 text, like what the model will be used for.
        folder: the checkpoint, whose tokenizer is used.
        vocab_size: rows of its embedding.
        context_tokens: the longest the model takes.

    Raises:
        InputError: no such text, no text, or no tokenizer.
        MachineError: not readable.
    """
    from runtime.reading.tokenizer import first_tokens, load_tokenizer, read_prompt

    data = read_limited(path, max_bytes=MAX_TEXT_BYTES)
    text = read_prompt(data, where=path)
    if not text.strip():
        raise InputError("holds no text", where=path, code="E-TEXT")
    tokenizer = load_tokenizer(folder, vocab_size=vocab_size)

    def encode(piece: str, num_tokens: int) -> list[int]:
        return first_tokens(tokenizer, piece, num_tokens=num_tokens)

    size = min(WINDOW_TOKENS, context_tokens)
    windows = _spread(text, encode, size=size) or _beginning(text, encode, size=size, bos=tokenizer.bos_token_id)
    record = CalibrationText(size=len(data), sha256=hashlib.sha256(data).hexdigest(), num_tokens=sum(map(len, windows)))
    return Text(windows, record)


Windows = tuple[tuple[int, ...], ...]
Encode = Callable[[str, int], list[int]]


def _spread(text: str, encode: Encode, *, size: int) -> Windows:
    """Return the beginnings of equal parts of a text, of one size; none where it is too short for that."""
    num_windows = MAX_TOKENS // size
    step = len(text) // num_windows
    windows = []
    for start in range(0, step * num_windows, step or 1):
        windows.append(tuple(encode(text[start : start + step], size)))
        if len(windows[-1]) < size:
            return ()
    return tuple(windows)


def _beginning(text: str, encode: Encode, *, size: int, bos: object) -> Windows:
    """Cut a text into windows of one size, the rest left out; one shorter window where it is shorter than that."""
    ids = encode(text, MAX_TOKENS)
    # What a tokenizer puts in front of every text belongs in front of every window.
    head = ids[:1] if ids[0] == bos else []
    own = ids[len(head) :]
    step = min(size - len(head), len(own))
    return tuple((*head, *own[start : start + step]) for start in range(0, len(own) - step + 1, max(step, 1)))
