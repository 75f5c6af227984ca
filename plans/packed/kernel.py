"""The compiled rounding: `rounding.c`, loaded with ctypes, and used where it gives what numpy gives.

Calls release the GIL and share nothing, so that threads round side by side.
"""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plans.native.building import Source, Unavailable, load
from plans.packed.blocks import GROUP, Scales, Words, round_blocks
from plans.packed.scheme import INT4, INT8, Scheme

# Two roundings, of a product and of a sum, must not become one.
SOURCE = Source("rounding", "rounding", Path(__file__).with_name("rounding.c"), options=("-ffp-contract=off",))
ROUNDED_DTYPES = ("BF16", "F16", "F32", "F64")
"""Stored dtypes; their place is their number in `rounding.c`."""


class _Run(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "words", "scales")),
        *((name, ctypes.c_int64) for name in ("num_groups", "stored", "bits", "scale")),
        *((name, ctypes.c_double) for name in ("squared_error", "squared")),
    )


class Kernel:
    """The loaded code."""

    def __init__(self, path: Path) -> None:
        """Load a library built of `SOURCE`.

        Raises:
            OSError: it cannot be loaded on this machine.
        """
        self._functions = ctypes.CDLL(str(path.resolve()))  # a bare name would be searched for elsewhere

    def round_groups(
        self, data: memoryview, words: Words, scales: Scales, *, stored: str, scheme: Scheme, scale: str
    ) -> tuple[float, float] | None:
        """Do what `plans.packed.blocks.round_blocks` does, to the bit, and return the same.

        Returns:
            None if anything is not finite: numpy is to say what, or to round such large weights.
        """
        assert words.flags.c_contiguous
        assert scales.flags.c_contiguous
        weights = np.frombuffer(data, np.uint8)  # holds on to the memory
        run = _Run(
            data=weights.ctypes.data,
            words=words.ctypes.data,
            scales=scales.ctypes.data,
            num_groups=len(scales),
            stored=ROUNDED_DTYPES.index(stored),
            bits=scheme.bits,
            scale=ROUNDED_DTYPES.index(scale),
        )
        self._functions.round_groups(ctypes.byref(run))
        sums = run.squared_error, run.squared
        return sums if all(map(math.isfinite, sums)) else None


@cache
def find_kernel() -> Kernel | Unavailable:
    """Return this machine's kernel, compiled first where that was never done, or why there is none.

    One that gives anything but numpy's bytes, whatever its compiler was told to do, counts as none.
    """
    found = load(SOURCE, Kernel)
    if isinstance(found, Kernel) and not _agrees(found):
        return Unavailable("the compiled rounding gives other numbers than numpy")
    return found


def _agrees(kernel: Kernel) -> bool:
    values = _hard_values()
    runs: dict[str, NDArray[Any]] = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F16": values.astype(np.float16),
        "F32": values,
        "F64": values.astype(np.float64),
    }
    return all(
        _rounded(kernel.round_groups, run, stored=stored, scheme=scheme, scale=scale)
        == _rounded(round_blocks, run, stored=stored, scheme=scheme, scale=scale, name="a sample")
        for stored, run in runs.items()
        for scheme in (INT4, INT8)
        for scale in ("BF16", "F16")
    )


def _rounded(rounding: Any, run: NDArray[Any], *, scheme: Scheme, **how: Any) -> tuple[bytes, bytes, Any]:
    num_groups = run.size // GROUP
    words, scales = np.empty((num_groups, scheme.bits), "<u4"), np.empty(num_groups, "<u2")
    sums = rounding(run.reshape(-1).view(np.uint8).data, words, scales, scheme=scheme, **how)
    return words.tobytes(), scales.tobytes(), sums


def _hard_values() -> NDArray[np.float32]:
    """Groups [G, 32] from the smallest floats to what fits a half; of ties, in numbers and scales, and of zeros."""
    powers = np.concatenate((np.arange(-149, -110), np.arange(-30, 16)))
    drawn = (np.arange(powers.size * GROUP, dtype=np.uint32) * np.uint32(2654435761)).view(np.int32)  # Knuth's hash
    spread = np.ldexp(drawn.reshape(-1, GROUP).astype(np.float32), (powers - 31)[:, None]).astype(np.float32)
    places = np.arange(-GROUP // 2, GROUP // 2, dtype=np.float32)
    zeros = np.where(places < 0, np.float32(-0.0), np.float32(0))
    numbers = np.stack((np.clip(places, -8, 7), places * 8))
    between = [numbers * np.float32(1 + 2.0**-power) for power in (8, 11)]  # two scales in bf16, or in fp16
    return np.concatenate((spread, -np.abs(spread), places[None] / 2, places[None] / -2, zeros[None], *between))
