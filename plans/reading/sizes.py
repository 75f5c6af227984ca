"""The grammar of sizes (``20GiB``, ``20GB``, ``512MiB``, plain bytes) and counts, and how bytes are printed."""

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from plans.errors import UsageError, printable

_UNITS = {"": 1, "B": 1}
_UNITS |= {prefix + "B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {prefix + "iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([KMGT]?i?B?)")
_COUNT = re.compile(r"[0-9]{1,18}")
MAX_BYTES = 2**60


def parse_bytes(text: str) -> int:
    """Return the number of bytes `text` stands for; a fraction is rounded down to a whole byte.

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes("20GB"), parse_bytes("7")
        (1536, 20000000000, 7)

    Raises:
        UsageError: if `text` is not a size between 0 and 2**60 bytes.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2) if match else "?"
    if match is None or unit not in _UNITS:
        raise UsageError(
            f"'{printable(text, limit=40)}' is not a size",
            expected="plain bytes or a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB (20GiB = 20 x 2^30)",
        )
    value = int(Fraction(match.group(1)) * _UNITS[unit])
    if value > MAX_BYTES:
        raise UsageError(f"'{printable(text, limit=40)}' is too large", expected="at most 2^60 bytes")
    return value


def parse_count(text: str) -> int | None:
    """Return the whole number that `text` writes in at most 18 plain digits, None where it does not.

    Example:
        >>> parse_count("12"), parse_count("-1"), parse_count("9" * 5000)
        (12, None, None)
    """
    return int(text) if _COUNT.fullmatch(text) else None


def format_bytes(value: int | float) -> str:
    """Return `value` bytes in binary units with three significant digits, as ``1.50 GiB``.

    Example:
        >>> format_bytes(3 * 2**29), format_bytes(12)
        ('1.50 GiB', '12 B')
    """
    size = float(value)
    if abs(size) < 1024:
        return f"{int(size)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if abs(size) < 1023.95 or unit == "PiB":
            break
    decimals = 2 if abs(size) < 9.995 else 1
    return f"{size:.{decimals}f} {unit}"


def _size_from_text(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


ByteSize = Annotated[int, BeforeValidator(_size_from_text), Field(ge=0, le=MAX_BYTES)]
"""A field that takes a whole number of bytes or a size such as ``"20GiB"``; written back as bytes."""
