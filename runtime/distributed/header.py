"""What stands at the beginning of every message on the data plane: a fixed header, and a table of a step's sequences.

gloo accepts a shorter or differently typed message silently and ends the process on a longer one. So all messages are
received into buffers of one fixed size. What does not fit in there comes after it, into a buffer of exactly the size
that the header announces, which was checked in full by then.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter

from plans.dtypes import STORED_DTYPES
from plans.errors import PeerError
from runtime.distributed.control.messages import PROTOCOL
from runtime.steps.parts import PROMPT, TOKEN, Part

MAGIC = 0x6C6C616D6172756E  # "llamarun"
NUM_WORDS = 14
HEADER_BYTES = 8 * NUM_WORDS
PART_WORDS = 5

STEP, TOKENS, CLOSE = 1, 2, 3
"""Kinds: hidden states for the next stage; what the last stage answers, for the driver; the end of a sequence, which
has no payload and comes after everything that was sent for it."""

MAX_PARTS = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 36
MODULUS = 2**61 - 1
"""Of the checksum: words that differ by it would have the same one."""
DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "int64": 4}
_ITEM_BYTES = {DTYPE_CODES[d.torch]: d.size_bytes for d in STORED_DTYPES.values() if d.torch in DTYPE_CODES}


def dtype_code(dtype: object) -> int:
    """Return the code of a torch dtype."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True, slots=True)
class Header:
    """What one payload is.

    Attributes:
        kind: `STEP`, `TOKENS` or `CLOSE`.
        sender: rank it comes from.
        step: counts the steps of an epoch from 0; of `CLOSE` the sequence that ends.
        parts: sequences in the step; the table that follows the header has one row for each. Of `CLOSE` 0.
        rows: tokens of all of them, or rows of their answers. Of `CLOSE` the slot where its cache is.
        width: hidden size, or numbers per answer. Of `CLOSE` whether the cache stays.
        dtype: a value of `DTYPE_CODES`.
        table: checksum of the table.
    """

    kind: int
    sender: int
    step: int
    parts: int
    rows: int
    width: int
    dtype: int
    table: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the payload."""
        return (0, 0) if self.kind == CLOSE else (self.rows, self.width)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


# `dataclasses.astuple` copies what it finds, and takes ten times as long.
_header_words, _part_words = (attrgetter(*(field.name for field in fields(kind))) for kind in (Header, Part))


@dataclass(frozen=True, slots=True)
class Stamp:
    """What every header of one run and epoch has in common."""

    model: int
    epoch: int

    @classmethod
    def of(cls, model_id: str, *, epoch: int) -> "Stamp":
        """Return the stamp for an export id (or another identity that starts with hexadecimal digits)."""
        return cls(int(model_id[:15], 16), epoch)


def pack(header: Header, stamp: Stamp) -> list[int]:
    """Return the words of a header.

    >>> len(pack(Header(STEP, 0, 1, 1, 5, 64, 2), Stamp(7, 0))) == NUM_WORDS
    True
    """
    words = [MAGIC, PROTOCOL, stamp.model, stamp.epoch, *_header_words(header), header.payload_bytes]
    return [*words, checksum(words)]


def unpack(words: Sequence[int], stamp: Stamp) -> Header:
    """Check everything about a header that does not depend on what was announced before.

    Raises:
        PeerError: naming the first field that is wrong.
    """
    if len(words) != NUM_WORDS:
        raise _wrong("length", len(words), NUM_WORDS)
    expected = (MAGIC, PROTOCOL, stamp.model, stamp.epoch)
    for name, found, wanted in zip(("magic", "protocol", "export id", "epoch"), words, expected, strict=False):
        if found != wanted:
            raise _wrong(name, found, wanted)
    if not all(0 <= word < MODULUS for word in words[4:]):
        raise _wrong("words", f"{min(words[4:])} to {max(words[4:])}", f"numbers from 0 to {MODULUS - 1}")
    if words[-1] != checksum(words[:-1]):
        raise _wrong("checksum", words[-1], checksum(words[:-1]))
    header = Header(*words[4:-2])
    if header.kind not in {STEP, TOKENS, CLOSE}:
        raise _wrong("kind", header.kind, f"{STEP}, {TOKENS} or {CLOSE}")
    if header.dtype not in _ITEM_BYTES:
        raise _wrong("dtype", header.dtype, "a known code")
    is_empty = header.kind != CLOSE and min(header.parts, header.width) < 1
    if min(_header_words(header)) < 0 or is_empty or header.parts > MAX_PARTS:
        raise _wrong("shape", (header.parts, *header.shape), "counts above 0")
    if header.payload_bytes != words[-2] or header.payload_bytes > MAX_PAYLOAD_BYTES:
        raise _wrong("payload", words[-2], header.payload_bytes)
    return header


def closing(sequence: int, *, slot: int, keeps: bool, sender: int) -> Header:
    """Return the header that ends a sequence."""
    return Header(CLOSE, sender, sequence, 0, slot, int(keeps), DTYPE_CODES["int64"])


def write_table(parts: Sequence[Part]) -> list[int]:
    """Return the words of the table that says whose tokens a step is made of, one row after the other."""
    return [word for part in parts for word in _part_words(part)]


def read_table(header: Header, words: Sequence[int]) -> list[Part]:
    """Check the words of a table against its header.

    Raises:
        PeerError: a row that makes no sense, or a table that was not announced.
    """
    if checksum(words) != header.table:
        raise _wrong("table", "a checksum of its own", header.table)
    parts = [Part(*words[at : at + PART_WORDS]) for at in range(0, len(words), PART_WORDS)]
    for part in parts:
        if min(_part_words(part)) < 0 or part.count < 1 or part.gives > TOKEN + PROMPT:
            raise _wrong("part", part, "counts above 0")
    if len({part.sequence for part in parts}) < len(parts):
        raise _wrong("table", "a sequence twice", "each once")
    num_rows = sum(part.count if header.kind == STEP else part.num_rows for part in parts)
    if num_rows != header.rows:
        raise _wrong("rows", header.rows, num_rows)
    return parts


def check_against(header: Header, **expected: int) -> None:
    """Compare fields of a header with what must come next: a stale, repeated or foreign message is found here.

    Raises:
        PeerError: naming the first field that differs.
    """
    for name, wanted in expected.items():
        if getattr(header, name) != wanted:
            raise _wrong(name, getattr(header, name), wanted)


def checksum(words: Sequence[int]) -> int:
    """Return a number that tells these words from others below MODULUS."""
    total = 0
    for word in words:
        total = (total * 1_000_003 + word) % MODULUS
    return total


def check_parts(found: Sequence[Part], expected: Sequence[Part]) -> None:
    """Require that parts are those of a step that was sent; faults come on the way.

    Raises:
        PeerError: they are not.
    """
    if [replace(part, fault=0) for part in found] != [replace(part, fault=0) for part in expected]:
        raise _wrong("parts", found, expected)


def _wrong(name: str, found: object, wanted: object) -> PeerError:
    return PeerError(
        f"a message on the data connection has {name.replace('_', ' ')} {found}", expected=str(wanted), code="E-HEADER"
    )
