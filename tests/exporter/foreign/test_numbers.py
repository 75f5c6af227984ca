"""fp32 rounded to narrower floats as torch rounds it."""

import numpy as np
import pytest
import torch

from exporter.foreign.numbers import narrowed

ODD = [0.0, -0.0, np.inf, -np.inf, 1e-45, 65504.0, 65519.9, 65520.0, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-9, -1e-8]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_is_torchs_to_the_bit(dtype: str, torch_dtype: torch.dtype) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32).view(np.float32)
    weights = np.concatenate([np.array(ODD, np.float32), bits[~np.isnan(bits)]])[None]
    theirs = torch.from_numpy(weights).to(torch_dtype).view(torch.uint8).numpy()
    assert np.array_equal(narrowed(weights, dtype=dtype), theirs)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_no_number_stays_none(dtype: str) -> None:
    found = narrowed(np.array([[np.nan, 1.0]], np.float32), dtype=dtype)
    as_torch = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    assert torch.from_numpy(found).view(as_torch).isnan().tolist() == [[True, False]]
