"""Strict reader of the header of a GGUF file: metadata and tensor table, never the tensors' data.

Format: `GGUF`, a version (2 or 3), how many tensors and metadata entries; the entries, each a key, a type and a value;
the tensor table, each a name, its dimensions (the innermost first), a type and an offset; then, aligned, the data.
Everything is little-endian here; a big-endian file is refused. Source: docs/gguf.md of ggml.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from plans.errors import InputError, IntegrityError, printable
from plans.gguf.types import TENSOR_TYPES, TensorType
from plans.reading.files import open_regular

MAX_HEADER_BYTES = 128 << 20
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 100_000
MAX_ARRAY = 1 << 20
"""Elements of a metadata array: the tokens of the largest vocabularies four times over."""
MAX_STRING_BYTES = 8 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a metadata type -> its spelling in `struct`."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the table. `begin` and `end` are absolute byte offsets in the file."""

    type: TensorType
    shape: tuple[int, ...]
    """As torch and Hugging Face write it: rows first, the innermost dimension last."""
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header."""

    version: int
    metadata: Mapping[str, Any]
    """Numbers, bools, strings and flat lists of these."""
    tensors: Mapping[str, GgufTensor]
    """In the order of the file."""
    alignment: int
    file_bytes: int
    header_sha256: str


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: not a GGUF file, of another version or byte order, malformed, or beyond the caps; names the entry.
        IntegrityError: the file ends before its header or before its last tensor.
        MachineError: not readable.
    """
    with open_regular(path) as fd, open(fd, "rb", closefd=False) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        return _Reader(file, path, file_bytes).header()


class _Reader:
    """Reads forward through one file; every count is checked before anything of its size is read."""

    def __init__(self, file: BufferedReader, path: Path, file_bytes: int) -> None:
        self._file, self._path, self._file_bytes = file, path, file_bytes
        self._position = 0
        self._digest = hashlib.sha256()

    def header(self) -> GgufHeader:
        version = self._opening()
        num_tensors = self._count("tensors", most=MAX_TENSORS)
        num_entries = self._count("metadata entries", most=MAX_ENTRIES)
        metadata = self._named("metadata", num_entries, self._value)
        table = self._named("tensor", num_tensors, self._tensor)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._refuse(
                f"general.alignment is {printable(alignment, limit=40)}", "a power of two from 8 to 1048576"
            )
        tensors = self._placed(table, alignment)
        return GgufHeader(version, metadata, tensors, alignment, self._file_bytes, self._digest.hexdigest())

    def _opening(self) -> int:
        magic = self._file.peek(4)[:4]
        if magic != _MAGIC:
            raise self._refuse(f"not a GGUF file: it begins with {printable(magic)}", "the bytes 'GGUF'")
        self._take(4)
        version: int = self._number("I")
        if version not in _VERSIONS:
            is_big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "is of the other byte order (big-endian)" if is_big_endian else f"is GGUF version {version}"
            raise self._refuse(what, "version 2 or 3, little-endian")
        return version

    def _named(self, kind: str, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._string(f"the name of {kind} {len(found)}")
            if name in found:
                raise self._refuse(f"{kind} '{printable(name, limit=80)}' appears twice")
            found[name] = read(name)
        return found

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind != _ARRAY:
            return self._scalar(key, kind)
        kind, count = self._number("I"), self._count(f"elements of {printable(key, limit=80)}", most=MAX_ARRAY)
        if kind in _SCALARS:
            values = struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * struct.calcsize(_SCALARS[kind])))
            return list(values)
        return [self._scalar(key, kind) for _ in range(count)]

    def _scalar(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind not in _SCALARS:
            raise self._refuse(
                f"'{printable(key, limit=80)}' is of type {kind}", "a number, a bool, a string or a flat array"
            )
        return self._number(_SCALARS[kind])

    def _tensor(self, name: str) -> tuple[TensorType, tuple[int, ...], int]:
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._refuse(f"{_shown(name)} has {num_dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed([self._number("Q") for _ in range(num_dimensions)]))
        number, offset = self._number("I"), self._number("Q")
        if number not in TENSOR_TYPES:
            known = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise self._refuse(f"{_shown(name)} is of type {number}, which is not known", f"one of {known}")
        found = TENSOR_TYPES[number]
        if shape[-1] % found.block_weights or not all(0 < size < 1 << 40 for size in shape):
            raise self._refuse(
                f"{_shown(name)} of {found.name} has shape {list(shape)}",
                f"rows of whole blocks of {found.block_weights}",
            )
        return found, shape, offset

    def _placed(
        self, table: Mapping[str, tuple[TensorType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Return the tensors at their places: one after the other, each aligned, without holes."""
        start = _aligned(self._position, alignment)
        position, tensors = 0, {}
        for name, (kind, shape, offset) in table.items():
            size = kind.bytes_of(prod(shape))
            if offset != position:
                raise self._refuse(f"{_shown(name)} lies at {offset}", f"{position}, after the one before it")
            tensors[name] = GgufTensor(kind, shape, start + offset, start + offset + size)
            position = _aligned(offset + size, alignment)
        end = max((tensor.end for tensor in tensors.values()), default=0)
        if end > self._file_bytes:
            raise self._truncated(f"the tensors end at byte {end}")
        return tensors

    def _count(self, what: str, *, most: int) -> int:
        count: int = self._number("Q")
        if count > most:
            raise self._refuse(f"{count} {what}", f"at most {most}")
        return count

    def _string(self, what: str) -> str:
        size = self._number("Q")
        if size > MAX_STRING_BYTES:
            raise self._refuse(
                f"{printable(what, limit=80)} is a string of {size} bytes", f"at most {MAX_STRING_BYTES}"
            )
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refuse(f"{printable(what, limit=80)} is not UTF-8 at byte {error.start}") from None

    def _number(self, spelling: str) -> Any:
        return struct.unpack(f"<{spelling}", self._take(struct.calcsize(f"<{spelling}")))[0]

    def _take(self, size: int) -> bytes:
        self._position += size
        if self._position > MAX_HEADER_BYTES:
            raise self._refuse("the header is longer than the cap", f"at most {MAX_HEADER_BYTES} bytes")
        data = self._file.read(size)
        if len(data) < size:
            raise self._truncated(f"the header goes on at byte {self._position}")
        self._digest.update(data)
        return data

    def _refuse(self, what: str, expected: str = "") -> InputError:
        return InputError(what, where=self._path, expected=expected, code="E-GGUF")

    def _truncated(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{what} and the file has {self._file_bytes}",
            where=self._path,
            hint="the file is truncated; fetch it again",
            code="E-TRUNCATED",
        )


def _shown(tensor: str) -> str:
    return f"tensor '{printable(tensor, limit=80)}'"


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
