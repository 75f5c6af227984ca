"""Symmetric GPTQ and AWQ -> the same numbers as compressed-tensors packs them, to the bit.

Both store matrices with a row per input, so that outputs lie side by side; packed, a row is an output. A word of GPTQ
holds eight inputs of one output, lowest bits first: that is a word of `weight_packed`, in another place. A word of AWQ
holds eight outputs of one input, in an order of its own. Weights are (number - zero) x scale; where every zero is the
middle, 8 of 16, that is what a packed number stands for.
Source: `qlinear_cuda_old.py` of AutoGPTQ, `packing_utils.py` of AutoAWQ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.foreign.made import Read
from exporter.foreign.numbers import Bytes
from plans.checkpoint.units import StoredTensor

Words = NDArray[np.uint32]

NUMBERS_PER_WORD = 8
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where, in a word of AWQ, output 0, 1, 2 ... of its eight lies: number `AWQ_ORDER[i]` from the lowest."""
MIDDLE = 8
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows made of columns of a stored matrix."""

    stored: StoredTensor
    unit_bytes: int
    """Bytes of a column, or of so many columns that are read together."""
    unit_columns: int
    """That many."""
    change: Callable[[Bytes], Bytes]
    """Columns side by side as they are stored, [stored rows, bytes], -> rows. [columns, row bytes]"""

    def rows(self, read: Read, first: int, last: int) -> Bytes:
        """Return rows `first` to `last` - 1."""
        entry = self.stored.entry
        num_rows = entry.shape[0]
        row_bytes = entry.size_bytes // num_rows
        begin, end = (count // self.unit_columns * self.unit_bytes for count in (first, last))
        data = bytearray(num_rows * (end - begin))
        view = memoryview(data)
        for row in range(num_rows):
            part = view[row * (end - begin) : (row + 1) * (end - begin)]
            read(self.stored.file, part, entry.begin + row * row_bytes + begin)
        return self.change(np.frombuffer(data, np.uint8).reshape(num_rows, -1))


def gptq_numbers(stored: StoredTensor) -> Columns:
    """`qweight` of GPTQ, [in / 8, out] words, as `weight_packed`."""
    return Columns(stored, _WORD_BYTES, 1, _transposed_words)


def awq_numbers(stored: StoredTensor) -> Columns:
    """`qweight` of AWQ, [in, out / 8] words, as `weight_packed`."""
    return Columns(stored, _WORD_BYTES, NUMBERS_PER_WORD, _transposed_awq)


def transposed_scales(stored: StoredTensor) -> Columns:
    """`scales` of both, [groups, out] of 2 bytes, as `weight_scale`."""
    return Columns(stored, 2, 1, lambda columns: _bytes(columns.view("<u2").T))


def _transposed_words(columns: Bytes) -> Bytes:
    return _bytes(columns.view("<u4").T)


def _transposed_awq(columns: Bytes) -> Bytes:
    numbers = awq_unpacked(columns.view("<u4")).T  # [out, in]
    return _bytes(numbers[:, 0::2] | (numbers[:, 1::2] << 4))


def awq_unpacked(words: Words) -> Bytes:
    """Return the numbers in words of AWQ. [R, W] -> [R, 8 W]"""
    shifts = np.array([4 * place for place in AWQ_ORDER], np.uint32)
    numbers = (words[..., None] >> shifts) & np.uint32(15)
    return numbers.reshape(len(words), -1).astype(np.uint8)


def gptq_zeros(words: Words, *, is_less_one: bool) -> Bytes:
    """Return the zeros in words of GPTQ, whose first format stored them less one. [R, W] -> [R, 8 W]"""
    numbers = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
    return (numbers.reshape(len(words), -1) + is_less_one).astype(np.uint8)


def _bytes(rows: np.ndarray) -> Bytes:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
