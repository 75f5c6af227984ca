"""The text that weights are calibrated on, as token ids in windows of one length."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from plans.errors import InputError
from plans.export.manifest import CalibrationText
from plans.reading.files import read_limited

MAX_TEXT_BYTES = 64 << 20
WINDOW_TOKENS = 512
MAX_TOKENS = 16384
"""More than these change the result little and take proportionally longer."""
FEW_TOKENS = 4096
MAX_BYTES_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class Text:
    """A text, cut into windows; each is read on its own."""

    windows: tuple[tuple[int, ...], ...]
    record: CalibrationText


def read_text(path: Path, *, folder: Path, vocab_size: int, context_tokens: int) -> Text:
    """Read a text and make tokens of its beginning.

    Args:
        path: UTF-8 text, like what the model will be used for.
        folder: the checkpoint, whose tokenizer is used.
        vocab_size: rows of its embedding.
        context_tokens: the longest the model takes.

    Raises:
        InputError: no such text, no text, or no tokenizer.
        MachineError: not readable.
    """
    from runtime.reading.tokenizer import encode_prompt, load_tokenizer, read_prompt

    data = read_limited(path, max_bytes=MAX_TEXT_BYTES)
    text = read_prompt(data, where=path)[: MAX_TOKENS * MAX_BYTES_PER_TOKEN]
    if not text.strip():
        raise InputError("holds no text", where=path, code="E-TEXT")
    tokenizer = load_tokenizer(folder, vocab_size=vocab_size)
    tokenizer.model_max_length = len(data) + 1  # windows are short, whatever the text is
    ids = encode_prompt(tokenizer, text, parses_special=False)[:MAX_TOKENS]
    # What a tokenizer puts in front of every text belongs in front of every window.
    head = ids[:1] if ids[0] == getattr(tokenizer, "bos_token_id", None) else []
    windows = _windows(ids[len(head) :], head, size=min(WINDOW_TOKENS, context_tokens))
    record = CalibrationText(size=len(data), sha256=hashlib.sha256(data).hexdigest(), num_tokens=sum(map(len, windows)))
    return Text(windows, record)


def _windows(ids: list[int], head: list[int], *, size: int) -> tuple[tuple[int, ...], ...]:
    """Cut into windows of one size, the rest left out; one shorter window where the text is shorter than that."""
    step = min(size - len(head), len(ids))
    return tuple((*head, *ids[start : start + step]) for start in range(0, len(ids) - step + 1, max(step, 1)))
