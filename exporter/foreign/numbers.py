"""fp32 weights -> the bytes of a narrower dtype, rounded to the nearest even number as torch and IEEE 754 do."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


_QUIET = np.uint32(0x40_0000)


def narrowed(weights: Floats, *, dtype: str) -> Bytes:
    """Return weights as BF16, F16 or F32, as safetensors names them. [R, C] -> [R, row bytes]

    >>> narrowed(np.array([[1.0]], np.float32), dtype="BF16").tolist()
    [[128, 63]]
    """
    return _NARROW[dtype](np.ascontiguousarray(weights)).view(np.uint8)


def _bf16(weights: Floats) -> np.ndarray:
    bits = weights.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    is_nan = np.isnan(weights)
    if is_nan.any():
        rounded[is_nan] = (bits[is_nan] | _QUIET) >> np.uint32(16)
    return rounded.astype("<u2")


def _f16(weights: Floats) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large becomes infinite, as torch rounds it
        return weights.astype("<f2")


_NARROW: Mapping[str, Callable[[Floats], np.ndarray]] = {
    "BF16": _bf16,
    "F16": _f16,
    "F32": lambda weights: weights.astype("<f4"),
}
