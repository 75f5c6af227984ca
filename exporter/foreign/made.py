"""Tensors that are not stored but made: a checkpoint of another format reads as if it were one of safetensors.

A made tensor has a place like any other, in bytes beyond every file, so that layout, copy and comparison ask for its
bytes as for stored ones. They are made a few rows at a time out of rows that are read, and never kept as a whole.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import numpy as np

from exporter.foreign.numbers import Bytes
from plans.checkpoint.header import TensorEntry
from plans.checkpoint.units import StoredTensor
from plans.dtypes import STORED_DTYPES

MADE_BEGIN = 1 << 60
"""Offsets from here on are of made tensors; no file is as long."""
_ALIGNMENT = 64

Read = Callable[[str, memoryview, int], None]
"""Fills a buffer from a file, by its name, from an offset on."""


class Recipe(Protocol):
    """How the rows of one tensor are made."""

    def rows(self, read: Read, first: int, last: int) -> Bytes:
        """Return the bytes of rows `first` to `last` - 1. [last - first, row bytes]"""


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor whose one row is known beforehand."""

    data: bytes

    def rows(self, _read: Read, _first: int, _last: int) -> Bytes:
        """Return it."""
        return np.frombuffer(self.data, np.uint8).reshape(1, -1)


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is made."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    recipe: Recipe
    file: str
    """Where most of it comes from, for messages."""
    unit_rows: int = 1
    """Rows that are only made together: chunks hold whole runs of them."""
    chunk_bytes: int = 1 << 20
    """About so much of it is made at once."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a vector is a single row."""
        width = STORED_DTYPES[self.dtype].size_bytes
        return prod(self.shape[1:] if len(self.shape) > 1 else self.shape) * width

    @property
    def num_rows(self) -> int:
        """Rows of it."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def chunk_rows(self) -> int:
        """Rows that are made at once."""
        return max(1, self.chunk_bytes // (self.row_bytes * self.unit_rows)) * self.unit_rows


@dataclass(slots=True)
class MadeTensors:
    """All made tensors of a checkpoint with their places."""

    tensors: tuple[Made, ...]
    _begins: list[int]
    _last: tuple[int, int, memoryview] = field(default=(-1, -1, memoryview(b"")))
    """Number of the tensor and of the chunk that was made last, with its bytes: reads go forward."""

    @classmethod
    def of(cls, tensors: Iterable[Made]) -> "MadeTensors":
        """Give every tensor a place."""
        tensors, begins, position = tuple(tensors), [], MADE_BEGIN
        for made in tensors:
            begins.append(position)
            position += -(-made.num_rows * made.row_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tensors, begins)

    def stored(self) -> dict[str, StoredTensor]:
        """Return the tensors as if they were stored, by name."""
        return {
            made.name: StoredTensor(
                made.file,
                TensorEntry(made.dtype, made.shape, begin, begin + made.num_rows * made.row_bytes),
                made.name,
            )
            for made, begin in zip(self.tensors, self._begins, strict=True)
        }

    def fill(self, read: Read, *, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with bytes from `offset` on, all of one tensor."""
        number = bisect_right(self._begins, offset) - 1
        made, position = self.tensors[number], offset - self._begins[number]
        chunk_bytes = made.chunk_rows * made.row_bytes
        while buffer:
            chunk = self._chunk(read, number, position // chunk_bytes)
            piece = chunk[position % chunk_bytes :][: len(buffer)]
            buffer[: len(piece)] = piece
            buffer, position = buffer[len(piece) :], position + len(piece)

    def _chunk(self, read: Read, number: int, chunk: int) -> memoryview:
        if self._last[:2] != (number, chunk):
            made = self.tensors[number]
            first = chunk * made.chunk_rows
            found = made.recipe.rows(read, first, min(first + made.chunk_rows, made.num_rows))
            self._last = number, chunk, np.ascontiguousarray(found).reshape(-1).data
        return self._last[2]
