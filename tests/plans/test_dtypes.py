"""The one table of dtypes against those who spell them: torch, safetensors and the readers of our own files."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load, save

from plans.dtypes import DTYPE_NAMES, DTYPES, STORED_DTYPES, Dtype, DtypeName

SPELLED_BY_TORCH = [dtype for dtype in STORED_DTYPES.values() if dtype.torch]


@pytest.mark.parametrize("dtype", SPELLED_BY_TORCH, ids=lambda dtype: dtype.stored)
def test_torch_and_safetensors_agree_with_the_table(dtype: Dtype) -> None:
    theirs = getattr(torch, dtype.torch)
    assert theirs.itemsize == dtype.size_bytes
    assert theirs.is_floating_point == dtype.is_float
    data = save({"a": torch.zeros(3, dtype=theirs)})
    assert f'"dtype":"{dtype.stored}"'.encode() in data
    assert load(data)["a"].dtype == theirs


def test_the_files_allow_exactly_the_dtypes_the_runtime_computes_in() -> None:
    assert set(DTYPES) == set(get_args(DtypeName))
    assert {DTYPE_NAMES[text] for dtype in DTYPES.values() for text in (dtype.torch, dtype.name)} == set(DTYPES)
    assert all(dtype.is_float and dtype.ggml for dtype in DTYPES.values())
