"""Weights -> whole numbers of few bits and one scale per group of 32: by compiled code where there is a compiler.

How it is done is said in `plans.packed.blocks`; both ways give the same bytes and the same sums.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plans.dtypes import STORED_DTYPES
from plans.native.building import Unavailable
from plans.packed.blocks import GROUP, round_blocks
from plans.packed.kernel import find_kernel
from plans.packed.scheme import WORD_BITS, Scheme


@dataclass(frozen=True, slots=True)
class Rounded:
    """A run of packed groups."""

    words: memoryview
    """As they lie in `weight_packed`."""
    scales: memoryview
    """As they lie in `weight_scale`."""
    squared_error: float
    """Sum of (weight - number x scale)^2."""
    squared: float
    """Sum of weight^2."""


def round_to_nearest(data: memoryview, *, stored: str, scheme: Scheme, scale: str, name: str) -> Rounded:
    """Round whole groups of weights.

    Args:
        data: weights as they are stored, a multiple of 32 of them, all of one or several rows.
        stored: their dtype in safetensors headers: BF16, F16, F32 or F64.
        scheme: bits of the numbers; groups are of 32.
        scale: dtype of the scales, BF16 or F16.
        name: of the tensor, for errors.

    Raises:
        InputError: (E-VALUES) a weight is NaN, infinite or too large for a scale.

    Example:
        >>> from plans.packed.scheme import INT8
        >>> weights = memoryview(np.arange(-16, 16, dtype="<f4").tobytes())
        >>> found = round_to_nearest(weights, stored="F32", scheme=INT8, scale="BF16", name="example")
        >>> len(found.words), len(found.scales), found.squared
        (32, 2, 2736.0)
    """
    assert scheme.group_size == GROUP
    num_groups = len(data) // (GROUP * STORED_DTYPES[stored].size_bytes)
    words = np.empty((num_groups, GROUP * scheme.bits // WORD_BITS), "<u4")
    scales = np.empty(num_groups, "<u2")
    kernel, sums = find_kernel(), None
    if not isinstance(kernel, Unavailable):
        sums = kernel.round_groups(data, words, scales, stored=stored, scheme=scheme, scale=scale)
    if sums is None:
        sums = round_blocks(data, words, scales, stored=stored, scheme=scheme, scale=scale, name=name)
    return Rounded(_bytes_of(words), _bytes_of(scales), *sums)


def _bytes_of(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
