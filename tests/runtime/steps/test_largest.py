"""The largest logit and what is not finite, by bits: what torch says of the same numbers widened."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from runtime.steps.largest import is_finite, largest

BITS = arrays.arrays(np.int16, st.integers(1, 300), elements=st.integers(-(2**15), 2**15 - 1))
FEW = arrays.arrays(np.int16, st.integers(1, 9), elements=st.sampled_from([0, -(2**15), 1, -1, 0x7F7F, 0x7F80, 0x7C00]))
"""Zeros of both signs, the smallest and the largest numbers, infinities."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(bits=BITS | FEW)
@settings(max_examples=300, deadline=None)
def test_two_byte_numbers_are_judged_as_their_wider_selves(bits: np.ndarray, dtype: torch.dtype) -> None:
    values = torch.from_numpy(bits).view(dtype)
    wide = values.float()
    assert is_finite(values) == bool(torch.isfinite(wide).all()) == is_finite(wide)
    if is_finite(values):
        assert largest(values) == largest(wide) == int((wide == wide.max()).nonzero()[0])


def test_a_sum_that_overflows_is_no_infinity() -> None:
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, torch.nan]))
