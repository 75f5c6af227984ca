"""The fixed header before every payload on the data plane.

gloo accepts a shorter or differently typed message silently and ends the process on a longer one. So every payload is
announced by a header of fixed size, checked in full, and then received into a buffer of exactly the announced size.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from plans.dtypes import STORED_DTYPES
from plans.errors import PeerError
from runtime.distributed.control.messages import PROTOCOL

MAGIC = 0x6C6C616D6172756E  # "llamarun"
NUM_WORDS = 16

STEP, TOKENS, CLOSE = 1, 2, 3
"""Kinds: hidden states for the next stage; the tokens the last stage chose, for the driver; the end of a group, which
has no payload and comes after everything that was sent for it."""

MAX_PAYLOAD_BYTES = 1 << 36
DTYPE_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "int64": 4}
_ITEM_BYTES = {DTYPE_CODES[d.torch]: d.size_bytes for d in STORED_DTYPES.values() if d.torch in DTYPE_CODES}


@dataclass(frozen=True, slots=True)
class Header:
    """What one payload is.

    Attributes:
        kind: `STEP`, `TOKENS` or `CLOSE`.
        sender: rank it comes from.
        group: sequences that run as one batch.
        step: counts the steps of the group from 0.
        start: columns of the batch that were computed before.
        rows: sequences.
        columns: tokens per sequence; 1 for `TOKENS`.
        width: hidden size; 1 for `TOKENS`.
        dtype: a value of `DTYPE_CODES`.
        needs_tokens: whether the last stage chooses tokens after this step.
    """

    kind: int
    sender: int
    group: int
    step: int
    start: int
    rows: int
    columns: int
    width: int
    dtype: int
    needs_tokens: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the payload."""
        return (self.rows,) if self.kind == TOKENS else (self.rows, self.columns, self.width)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload."""
        return 0 if self.kind == CLOSE else self.rows * self.columns * self.width * _ITEM_BYTES[self.dtype]


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

    >>> len(pack(Header(STEP, 0, 1, 0, 0, 1, 5, 64, 2, 0), Stamp(7, 0))) == NUM_WORDS
    True
    """
    words = [MAGIC, PROTOCOL, stamp.model, stamp.epoch, *astuple(header), header.payload_bytes]
    return [*words, _checksum(words)]


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
    if words[-1] != _checksum(words[:-1]):
        raise _wrong("checksum", words[-1], _checksum(words[:-1]))
    header = Header(*words[4:-2])
    if header.kind not in {STEP, TOKENS, CLOSE}:
        raise _wrong("kind", header.kind, f"{STEP}, {TOKENS} or {CLOSE}")
    if header.dtype not in _ITEM_BYTES:
        raise _wrong("dtype", header.dtype, "a known code")
    if min(astuple(header)) < 0 or min(header.rows, header.columns, header.width) < 1:
        raise _wrong("shape", header.shape, "counts above 0")
    if header.payload_bytes != words[-2] or header.payload_bytes > MAX_PAYLOAD_BYTES:
        raise _wrong("payload", words[-2], header.payload_bytes)
    return header


def closing(group: int, *, sender: int) -> Header:
    """Return the header that ends a group."""
    return Header(CLOSE, sender, group, 0, 0, 1, 1, 1, DTYPE_CODES["int64"], 0)


def check_against(header: Header, **expected: int) -> None:
    """Compare fields of a header with what must come next: a stale, repeated or foreign message is found here.

    Raises:
        PeerError: naming the first field that differs.
    """
    for name, wanted in expected.items():
        if getattr(header, name) != wanted:
            raise _wrong(name, getattr(header, name), wanted)


def _checksum(words: Sequence[int]) -> int:
    total = 0
    for word in words:
        total = (total * 1_000_003 + word) % (2**61 - 1)
    return total


def _wrong(name: str, found: object, wanted: object) -> PeerError:
    return PeerError(
        f"a message on the data connection has {name.replace('_', ' ')} {found}", expected=str(wanted), code="E-HEADER"
    )
