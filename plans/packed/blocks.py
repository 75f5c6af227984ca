"""Weights -> whole numbers of few bits and one scale per group of 32, by least squared error, in numpy.

For numbers q the best scale is sum(x q) / sum(q q); for a scale d the best numbers are x / d, rounded. A few first
scales take one turn each, and the best of them counts: one where the extreme of a group becomes the lowest number, one
that cuts it off a little, one of the other sign, in which it becomes the highest. That is within 2 % of an exhaustive
search.

Every sum has a fixed order and no step depends on the processor, so equal weights give equal bytes everywhere; and
`rounding.c` takes the same steps in the same order.

Shapes: G groups side by side. A group's numbers lie as [2, 16, G], even columns before odd ones, as they are packed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from plans.dtypes import STORED_DTYPES
from plans.errors import InputError
from plans.packed.scheme import WORD_BITS, Scheme

GROUP: Final = 32
BLOCK_GROUPS: Final = 4096
"""Groups computed at once: what they need fits a core's own memory."""
_HALF = GROUP // 2
_FIRST_SCALES = {4: (1.0, 0.9, -8 / 7), 8: (1.0,)}
"""In terms of the one that makes the extreme the lowest number."""
_TINY = float(np.finfo(np.float32).tiny)

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Scales = NDArray[np.uint16]


def round_blocks(
    data: memoryview, words: Words, scales: Scales, *, stored: str, scheme: Scheme, scale: str, name: str
) -> tuple[float, float]:
    """Fill `words` [G, bits] and `scales` [G], and return the sums of squares.

    Args:
        data: weights of G groups.
        words: as they lie in `weight_packed`.
        scales: as they lie in `weight_scale`.
        stored: dtype of the weights.
        scheme: bits of the numbers.
        scale: dtype of the scales.
        name: of the tensor, for errors.

    Returns:
        The sums of (weight - number x scale)^2 and of weight^2.

    Raises:
        InputError: (E-VALUES) a weight is NaN, infinite or too large for a scale.
    """
    num_groups = len(scales)
    block = _Block.of(min(BLOCK_GROUPS, num_groups))
    error = squared = 0.0
    for start in range(0, num_groups, BLOCK_GROUPS):
        end = min(start + BLOCK_GROUPS, num_groups)
        block = block if end - start == block.num_groups else _Block.of(end - start)
        block.load(data, start, end, stored=stored)
        scales[start:end], used = _as_stored(block.best_scale(scheme, name), scale, name)
        block.round_by(used, scheme)
        error, squared = error + block.squared_error(used), squared + block.squared()
        block.pack_into(words[start:end], scheme)
    return error, squared


@dataclass(frozen=True, slots=True)
class _Block:
    """Some groups and what their computation needs."""

    weights: Floats
    """[2, 16, G]"""
    numbers: Floats
    """[2, 16, G], whole numbers."""
    products: Floats
    """[2, 16, G]"""
    pairs: Words
    """[16, G]"""

    @classmethod
    def of(cls, num_groups: int) -> "_Block":
        shape = (2, _HALF, num_groups)
        weights, numbers, products = (np.empty(shape, np.float32) for _ in range(3))
        return cls(weights, numbers, products, np.empty(shape[1:], np.uint32))

    @property
    def num_groups(self) -> int:
        return int(self.pairs.shape[1])

    def load(self, data: memoryview, start: int, end: int, *, stored: str) -> None:
        width = STORED_DTYPES[stored].size_bytes
        own = data[start * GROUP * width : end * GROUP * width]
        if stored == "BF16":  # the upper half of a float: two of them are read as one word
            np.copyto(self.pairs, np.frombuffer(own, "<u4").reshape(-1, _HALF).T)
            bits = self.weights.view(np.uint32)
            np.left_shift(self.pairs, 16, out=bits[0])
            np.bitwise_and(self.pairs, np.uint32(0xFFFF0000), out=bits[1])
            return
        values = np.frombuffer(own, f"<f{width}").reshape(-1, _HALF, 2)
        with np.errstate(over="ignore"):  # a double that is no float becomes infinite, and is refused as that
            for parity in (0, 1):
                np.copyto(self.weights[parity], values[:, :, parity].T, casting="same_kind")

    def best_scale(self, scheme: Scheme, name: str) -> Floats:
        """Return the scale of least squared error of every group."""
        lowest = -(1 << (scheme.bits - 1))
        high, low = self._fold(np.maximum, self.weights).copy(), self._fold(np.minimum, self.weights)
        first: Floats = np.divide(np.where(high > -low, high, low), np.float32(lowest), dtype=np.float32)
        if not np.isfinite(first).all():
            raise InputError("holds NaN or infinite values, which cannot be rounded", where=name, code="E-VALUES")
        best: Floats = np.zeros_like(first)
        most = np.full_like(first, -1)
        for factor in _FIRST_SCALES[scheme.bits]:
            self.round_by(first * np.float32(factor), scheme)
            np.multiply(self.weights, self.numbers, out=self.products)
            mixed = self._fold(np.add, self.products).copy()
            np.multiply(self.numbers, self.numbers, out=self.products)
            found = mixed / np.maximum(self._fold(np.add, self.products), 1)
            with np.errstate(over="ignore"):
                gain = mixed * found  # so much smaller is the squared error than that of zeros
            is_better = gain > most
            np.copyto(best, found, where=is_better)
            np.copyto(most, gain, where=is_better)
        return best

    def round_by(self, scale: Floats, scheme: Scheme) -> None:
        """Fill `numbers` with the weights divided by their group's scale, rounded and cut off."""
        highest = (1 << (scheme.bits - 1)) - 1
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) >= _TINY)
        np.multiply(self.weights, inverse, out=self.numbers)
        np.maximum(self.numbers, np.float32(-highest - 1), out=self.numbers)
        np.minimum(self.numbers, np.float32(highest), out=self.numbers)
        np.rint(self.numbers, out=self.numbers)

    def squared_error(self, scale: Floats) -> float:
        np.multiply(self.numbers, scale, out=self.products)
        np.subtract(self.weights, self.products, out=self.products)
        return self._sum_of_squares(self.products)

    def squared(self) -> float:
        return self._sum_of_squares(self.weights)

    def pack_into(self, words: Words, scheme: Scheme) -> None:
        """Write the numbers as words [G, bits]; overwrites `numbers`."""
        bits = scheme.bits
        np.add(self.numbers, np.float32(1 << (bits - 1)), out=self.numbers)
        np.multiply(self.numbers[1], np.float32(1 << bits), out=self.numbers[1])
        np.add(self.numbers[0], self.numbers[1], out=self.numbers[0])
        np.copyto(self.pairs, self.numbers[0], casting="unsafe")
        per_word = WORD_BITS // (2 * bits)
        parts = self.pairs.reshape(-1, per_word, self.num_groups)
        packed = parts[:, 0]
        for place in range(1, per_word):
            packed |= parts[:, place] << np.uint32(2 * bits * place)
        np.copyto(words, packed.T)

    def _sum_of_squares(self, values: Floats) -> float:
        np.multiply(values, values, out=self.products)
        return _total(self._fold(np.add, self.products))

    def _fold(self, combine: Callable[..., Any], values: Floats) -> Floats:
        """Combine the 32 numbers of every group, by halves; the answer is overwritten by the next call."""
        halves = self.pairs.view(np.float32)
        combine(values[0], values[1], out=halves)
        for half in (8, 4, 2, 1):
            combine(halves[:half], halves[half : 2 * half], out=halves[:half])
        found: Floats = halves[0]
        return found


def _as_stored(scales: Floats, dtype: str, name: str) -> tuple[Scales, Floats]:
    """Round scales to the dtype they are stored in; return their bits and their values."""
    if dtype == "BF16":  # to nearest, ties to even
        bits = scales.view(np.uint32)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return upper.astype(np.uint16), (upper << 16).view(np.float32)
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise InputError("holds values too large for a scale in fp16", where=name, hint="use bf16", code="E-VALUES")
    return rounded.view(np.uint16), rounded.astype(np.float32)


def _total(sums: Floats) -> float:
    """Add up the sums of a block's groups in double precision, by halves."""
    left = np.zeros(BLOCK_GROUPS)
    left[: len(sums)] = sums
    while len(left) > 1:
        left = left[: len(left) // 2] + left[len(left) // 2 :]
    return float(left[0])
