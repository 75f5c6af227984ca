"""Are all of some numbers finite, and which is the largest? Of two-byte numbers by their bits, without widening them.

A step of a small model takes milliseconds: making fp32 of its logits, and looking at them twice, is a tenth of that.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

_INFINITIES = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_SIGN = 0x8000


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16))
    (True, False)
    """
    infinity = _INFINITIES.get(values.dtype)
    if infinity is not None and values.device.type == "cpu":
        bits = _bits(values)
        return bool(bits.max() < infinity and bits.view(np.uint16).max() < infinity + _SIGN)
    # A sum costs less than looking at each, and only seldom overflows.
    return math.isfinite(values.sum(dtype=torch.float32)) or bool(torch.isfinite(values).all())


def largest(logits: torch.Tensor) -> int:
    """Return the place of the largest of finite numbers [V] on the CPU; of several the first, as `torch.argmax`.

    >>> largest(torch.tensor([0.5, 2.0, 2.0], dtype=torch.bfloat16))
    1
    """
    if logits.dtype in _INFINITIES:
        bits = _bits(logits)
        best = int(bits.argmax())
        if bits[best] > 0:  # positive numbers have the order of their bits, and every other has the sign's or none
            return best
    return int(logits.float().numpy().argmax())  # takes a tenth of the time of torch's


def _bits(values: torch.Tensor) -> NDArray[np.int16]:
    bits: NDArray[np.int16] = values.view(torch.int16).numpy()
    return bits
