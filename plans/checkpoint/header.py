"""Strict reader of safetensors headers.

The library's own reader accepts duplicate names, path-like names and a million empty tensors; weights from elsewhere
are untrusted, so every header is parsed and checked here before anything else touches the file.
Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensor data without holes.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.dtypes import STORED_DTYPES
from plans.errors import InputError, IntegrityError, printable
from plans.reading.files import open_regular, read_exactly, sha256_hex
from plans.reading.strict import parse_json

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS_PER_FILE = 100_000
MAX_DIMENSIONS = 8
MAX_VALUES_PER_FILE = MAX_TENSORS_PER_FILE * (MAX_DIMENSIONS + 7)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,254}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header. `begin` and `end` are absolute byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return self.size_bytes // STORED_DTYPES[self.dtype].size_bytes


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: tensors in file order, free-form metadata, and what identifies it."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    header_sha256: str
    file_bytes: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file without reading its data.

    Raises:
        InputError: not a safetensors file, header malformed or beyond the caps.
        IntegrityError: offsets overlap, leave a hole, or do not end where the file ends.
        MachineError: not readable.
    """
    with open_regular(path) as fd:
        file_bytes = os.fstat(fd).st_size
        prefix = read_exactly(fd, size=min(file_bytes, 512), offset=0, where=path)
        header_bytes = _header_length(prefix, file_bytes, path)
        raw = read_exactly(fd, size=header_bytes, offset=8, where=path)
    # Counted before parsing: a million entries would cost seconds and a gigabyte to find out that they are too many.
    num_tensors = raw.count(b'"data_offsets"')
    if num_tensors > MAX_TENSORS_PER_FILE:
        raise InputError(
            f"{num_tensors} tensors in one file",
            where=path,
            expected=f"at most {MAX_TENSORS_PER_FILE}",
            code="E-HEADER",
        )
    document = parse_json(raw, where=path, max_values=MAX_VALUES_PER_FILE)
    if not isinstance(document, dict):
        raise InputError("the header is not a JSON object", where=path, code="E-HEADER")
    metadata = _check_metadata(document.pop("__metadata__", {}), path)
    data_start = 8 + header_bytes
    entries = {name: _check_entry(name, value, data_start, path) for name, value in document.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(ordered, data_start, file_bytes, path)
    return SafetensorsHeader(ordered, metadata, sha256_hex(raw), file_bytes)


def _header_length(prefix: bytes, file_bytes: int, path: Path) -> int:
    length = int.from_bytes(prefix[:8], "little") if len(prefix) >= 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        _recognise_other_files(prefix, path)
        raise InputError(
            f"not a safetensors file: the header length reads {length} in a file of {file_bytes} bytes",
            where=path,
            expected=f"2 to {MAX_HEADER_BYTES} bytes",
            code="E-HEADER",
        )
    if length > file_bytes - 8:
        raise IntegrityError(
            f"the header needs {length + 8} bytes and the file has {file_bytes}",
            where=path,
            hint="the file is truncated; fetch it again",
            code="E-TRUNCATED",
        )
    if prefix[8:9] != b"{":
        raise InputError("not a safetensors file: no JSON object after the length", where=path, code="E-HEADER")
    return length


def _recognise_other_files(prefix: bytes, path: Path) -> None:
    """Say what a file is that often lies where weights should; text never reads as a plausible header length."""
    if prefix.startswith(b"version https://git-lfs"):
        raise InputError(
            "is a Git LFS pointer, not the weights",
            where=path,
            hint="fetch the real files with 'git lfs pull'",
            code="E-HEADER",
        )
    if prefix.lstrip()[:1] == b"<":
        raise InputError(
            "is an HTML or XML page, not the weights", where=path, hint="download it again", code="E-HEADER"
        )


def _check_metadata(value: Any, path: Path) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError("__metadata__ is not a table of strings", where=path, code="E-HEADER")
    return value


def _check_entry(name: str, value: Any, data_start: int, path: Path) -> TensorEntry:
    where = f"{path}:{printable(name, limit=80)}"
    if not _NAME.fullmatch(name):
        raise InputError(
            "unsafe tensor name",
            where=where,
            expected="letters, digits, '_', '.', '-' or ':'",
            code="E-HEADER",
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError("malformed entry", where=where, expected="dtype, shape and data_offsets", code="E-HEADER")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise InputError(
            f"dtype {printable(dtype, limit=30)} is not supported",
            where=where,
            expected="one of " + ", ".join(STORED_DTYPES),
            code="E-DTYPE",
        )
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _is_sizes(offsets) or len(offsets) != 2:
        raise InputError("shape and data_offsets must be lists of non-negative integers", where=where, code="E-HEADER")
    num_bytes = STORED_DTYPES[dtype].size_bytes
    for size in shape:
        num_bytes *= size
    if num_bytes != offsets[1] - offsets[0]:
        raise InputError(
            f"shape {shape} of {dtype} is {num_bytes} bytes, the offsets hold {offsets[1] - offsets[0]}",
            where=where,
            code="E-HEADER",
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _check_layout(entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int, path: Path) -> None:
    position = data_start
    for name, entry in entries.items():
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise IntegrityError(
                f"starts at byte {entry.begin} and {kind} (expected {position})",
                where=f"{path}:{name}",
                code="E-LAYOUT",
            )
        position = entry.end
    if position != file_bytes:
        raise IntegrityError(
            f"the header describes {position} bytes and the file has {file_bytes}",
            where=path,
            hint="the file is truncated or was appended to; fetch it again",
            code="E-TRUNCATED",
        )
