"""Whole numbers <-> the words they are packed in, in numpy; see `plans.packed.scheme` for which bits hold what."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from plans.dtypes import STORED_DTYPES
from plans.packed.scheme import Scheme

Numbers = NDArray[np.int8]


def pack_numbers(numbers: Numbers, scheme: Scheme) -> bytes:
    """Return rows of numbers as they lie in `weight_packed`.

    Example:
        >>> from plans.packed.scheme import INT4
        >>> pack_numbers(np.array([[-8, -7, 7, 0, 0, 0, 0, 0]], np.int8), INT4).hex()
        '108f8888'
    """
    raised: NDArray[np.uint8] = (numbers.astype(np.int16) + (1 << (scheme.bits - 1))).astype(np.uint8)
    if scheme.bits == 4:
        return (raised[..., 0::2] | raised[..., 1::2] << np.uint8(4)).tobytes()
    return raised.tobytes()


def unpack_numbers(data: memoryview, scheme: Scheme) -> Numbers:
    """Return the numbers of a run of words, one after the other."""
    raised = np.frombuffer(data, np.uint8)
    if scheme.bits == 4:
        raised = np.stack((raised & 15, raised >> 4), axis=-1).reshape(-1)
    numbers: Numbers = (raised.astype(np.int16) - (1 << (scheme.bits - 1))).astype(np.int8)
    return numbers


def squares(
    weights: memoryview, words: memoryview, scales: memoryview, *, stored: str, scheme: Scheme, scale: str
) -> tuple[float, float]:
    """Return the sums of (weight - number x scale)^2 and of weight^2 over whole groups.

    Args:
        weights: as they are stored, in the dtype `stored`.
        words: their numbers, packed.
        scales: of every group, in the dtype `scale`.
        stored: BF16, F16, F32 or F64.
        scheme: how the numbers are packed; with groups.
        scale: BF16 or F16.
    """
    assert scheme.group_size is not None
    original = as_float64(weights, stored).reshape(-1, scheme.group_size)
    numbers = unpack_numbers(words, scheme).reshape(original.shape)
    error = original - numbers * as_float64(scales, scale)[:, None]
    return float(np.add.reduce((error * error).ravel())), float(np.add.reduce((original * original).ravel()))


def as_float64(data: memoryview, stored: str) -> NDArray[Any]:
    """Return stored floats as doubles, which hold each of them exactly."""
    if stored == "BF16":  # the upper half of a float
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, f"<f{STORED_DTYPES[stored].size_bytes}").astype(np.float64)
