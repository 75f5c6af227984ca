"""The numbers in blocks of GGUF tensors, against the package `gguf`, to the bit."""

import gguf
import numpy as np
import pytest

from exporter.foreign.gguf.blocks import LAYOUTS, dequantise
from plans.gguf.types import TYPES_BY_NAME

ROWS, COLUMNS = 3, 1024


@pytest.mark.parametrize("kind", [*LAYOUTS, "F32", "F16", "BF16"])
def test_weights_are_the_packages_to_the_bit(kind: str) -> None:
    """Of any bytes: infinite scales and none at all are read as they are."""
    raw = np.random.default_rng(7).integers(0, 256, (ROWS, TYPES_BY_NAME[kind].bytes_of(COLUMNS)), np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    ours = dequantise(raw, kind=kind)
    assert ours.dtype == np.float32
    assert ours.shape == (ROWS, COLUMNS)
    is_nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), is_nan)
    assert np.array_equal(ours.view(np.uint32)[~is_nan], theirs.view(np.uint32)[~is_nan])


def test_every_layout_has_the_bytes_of_its_type() -> None:
    assert {name: layout.itemsize for name, layout in LAYOUTS.items()} == {
        name: TYPES_BY_NAME[name].block_bytes for name in LAYOUTS
    }
