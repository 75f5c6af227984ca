"""`rope_freqs.weight` -> the rope scaling of Llama 3.1 that convert_hf_to_gguf.py made it of.

The tensor holds, for each pair of a head, by what its frequency is divided. Which four numbers of `config.json` gave
them cannot be told from the factors alone in general; Meta published two sets, which differ in the largest factor.
Source: `Llama3Model.generate_extra_tensors` there, and `_compute_llama3_parameters` of transformers.
"""

import math
from typing import Any

PUBLISHED_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.3, and of Llama 3.2."""
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_TOLERANCE = 1e-5
"""The tensor is fp32, and was computed in fp32."""


def llama3_table(factors: tuple[float, ...], *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the `rope_scaling` that gives these factors; None where none that was published does.

    Args:
        factors: the numbers of `rope_freqs.weight`, one for each pair of a head.
        theta: base of the frequencies.
        head_dim: width of a head.
    """
    for factor in PUBLISHED_FACTORS:
        expected = [_divisor(theta ** (2 * pair / head_dim), factor) for pair in range(head_dim // 2)]
        is_close = (
            abs(found - wanted) <= _TOLERANCE * wanted for found, wanted in zip(factors, expected, strict=False)
        )
        if len(factors) == len(expected) and all(is_close):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": _ORIGINAL,
            }
    return None


def _divisor(period: float, factor: float) -> float:
    """By what the frequency of a pair is divided; `period` is its wavelength / 2 pi, in tokens."""
    wavelength = 2 * math.pi * period
    if wavelength < _ORIGINAL / _HIGH:
        return 1.0
    if wavelength > _ORIGINAL / _LOW:
        return factor
    smooth = (_ORIGINAL / wavelength - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
