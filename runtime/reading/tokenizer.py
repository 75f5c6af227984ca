"""Load a checkpoint's tokenizer and turn prompts into token ids, refusing what would go wrong later."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plans.checkpoint.units import TOKENIZER_NAMES
from plans.errors import InputError, UsageError, printable
from plans.reading.files import read_limited
from plans.reading.strict import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 128 << 20
MAX_TOKENIZER_VALUES = 16_000_000
MAX_TOKENIZER_STEPS = 16
"""Of each kind."""
MAX_TEXT_GROWTH = 256
"""Times the bytes of a text that all steps of a kind may make; usual ones triple spaces, or double some letters."""
MAX_PROMPT_BYTES = 64 << 20
CHARACTERS_PER_TOKEN = 32
"""No tokens are longer than this on average."""


def load_tokenizer(folder: Path, *, vocab_size: int) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint folder; never runs code that lies in it.

    Args:
        folder: the checkpoint.
        vocab_size: rows of the embedding; every token id must be below it.

    Raises:
        InputError: missing, malformed, or with more tokens than the model has rows.
    """
    from transformers import AutoTokenizer

    if not holds_tokenizer(folder):
        raise missing_tokenizer(folder)
    if (folder / TOKENIZER_NAME).is_file():
        _check_vocabulary(folder / TOKENIZER_NAME, vocab_size)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        encoder: Any = tokenizer
        encoder("x")  # settings of a wrong type are met here, and not at the first prompt
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust core panics with exceptions that are no Exception
        raise InputError(
            f"the tokenizer does not load: {printable(error, limit=300)}", where=folder, code="E-TOKENIZER"
        ) from None
    return tokenizer


def holds_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer of any kind."""
    return any((folder / name).is_file() for name in TOKENIZER_NAMES)


def missing_tokenizer(folder: Path) -> InputError:
    """Return the error of a folder without one."""
    return InputError(f"no {TOKENIZER_NAME} in the folder", where=folder, code="E-TOKENIZER")


def _check_vocabulary(path: Path, vocab_size: int) -> None:
    data = read_limited(path, max_bytes=MAX_TOKENIZER_BYTES)
    document = parse_json(data, where=path, max_values=MAX_TOKENIZER_VALUES, max_keys=MAX_TOKENIZER_VALUES)
    model = document.get("model") if isinstance(document, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list):
        raise InputError("holds no vocabulary", where=path, expected="model.vocab", code="E-TOKENIZER")
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    if len(set(map(str, ids))) != len(ids):
        raise InputError("two tokens share an id", where=path, code="E-TOKENIZER")
    _check_steps(document, where=path)
    added = document.get("added_tokens") or []
    if not isinstance(added, list):
        raise InputError("added_tokens is no list", where=path, code="E-TOKENIZER")
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    bad = next((i for i in ids if type(i) is not int or not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InputError(
            f"token id {printable(bad, limit=30)} is outside the model's vocabulary",
            where=path,
            expected=f"0 to {vocab_size - 1}, the rows of the embedding",
            code="E-TOKENIZER",
        )


def _check_steps(document: dict[str, Any], *, where: Path) -> None:
    for kind in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps, left = [], [document.get(kind)]
        while left:
            value = left.pop()
            steps += [value] if isinstance(value, dict) and "type" in value else []
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        growth = math.prod(map(_growth, steps[: MAX_TOKENIZER_STEPS + 1]))
        for what, found, most in (
            (f"has {len(steps)} steps", len(steps), MAX_TOKENIZER_STEPS),
            ("makes text many times as long", growth, MAX_TEXT_GROWTH),
        ):
            if found > most:
                raise InputError(f"{kind} {what}", where=where, expected=f"at most {most}", code="E-TOKENIZER")


def _growth(step: dict[str, Any]) -> int:
    """Return how many bytes a step of a tokenizer can make of one, at least 1: another byte may not be touched."""
    if step["type"] == "ByteLevel":
        return 2
    new = step.get("content") if step["type"] == "Replace" else step.get("replacement")
    if not isinstance(new, str):
        return 1
    pattern = step.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    size = len(new.encode("utf-8", "surrogatepass"))
    if isinstance(old, str) and old:
        return max(1, -(-size // len(old.encode("utf-8", "surrogatepass"))))
    return 1 + size  # a regular expression may match between any two characters


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, *, parses_special: bool) -> list[int]:
    """Return the token ids of a prompt; names of special tokens in it are plain text unless `parses_special`.

    Raises:
        UsageError: an empty prompt for a model without a first token, or text that is not Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"not UTF-8 at character {error.start}", where="prompt", code="E-PROMPT") from None
    encoded: Any = tokenizer(text, split_special_tokens=not parses_special)
    ids: list[int] = list(encoded["input_ids"])
    if not ids:
        raise UsageError(
            "the prompt is empty and this model has no begin-of-sequence token to start from",
            hint="give some text with -p",
            code="E-PROMPT",
        )
    return ids


def first_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, num_tokens: int) -> list[int]:
    """Return at most so many first tokens of a text, of which no more is read than they need; none of an empty one."""
    piece = text[: num_tokens * CHARACTERS_PER_TOKEN]
    # What is longer than the model reads is cut into windows: no reason to warn.
    tokenizer.model_max_length = max(tokenizer.model_max_length, len(piece) + 1)
    return encode_prompt(tokenizer, piece, parses_special=False)[:num_tokens] if piece else []


def read_prompt(data: bytes, *, where: object) -> str:
    """Decode a prompt that came from a file or from standard input.

    Raises:
        UsageError: too long.
        InputError: not UTF-8, or with NUL characters; the message names the byte.
    """
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"more than {MAX_PROMPT_BYTES} bytes", where=where, code="E-PROMPT")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where, expected="UTF-8", code="E-PROMPT") from None
    if "\0" in text:
        raise InputError(f"a NUL character at byte {data.index(0)}", where=where, code="E-PROMPT")
    return text
