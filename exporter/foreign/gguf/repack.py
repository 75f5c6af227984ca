"""Q4_0 and Q8_0 -> the same numbers as compressed-tensors packs them, to the bit.

Both hold whole numbers times one fp16 scale for 32 columns. Only places change: of Q4_0 byte k of a block holds column
k in its low half and column k + 16 in its high half, packed it holds columns 2k and 2k + 1; Q8_0 holds numbers with a
sign, packed they are + 128.
"""

from collections.abc import Mapping

import numpy as np

from exporter.foreign.gguf.blocks import blocks_of
from exporter.foreign.numbers import Bytes
from plans.packed.scheme import INT4, INT8, Scheme

_PAIRS = 8
SCHEMES: Mapping[str, Scheme] = {"Q4_0": INT4, "Q8_0": INT8}
"""Types that lose nothing -> how they are packed."""


def packed_numbers(rows: Bytes, *, kind: str) -> Bytes:
    """Return the bytes of `weight_packed`. [R, row bytes] -> [R, packed row bytes]"""
    blocks = blocks_of(rows, kind=kind)
    if kind == "Q8_0":
        return (np.ascontiguousarray(blocks["whole"]).view(np.uint8) ^ np.uint8(0x80)).reshape(len(rows), -1)
    pairs = np.ascontiguousarray(blocks["low"]).view("<u2")  # two bytes, each of two columns
    packed = np.empty((len(blocks), 2, _PAIRS), np.uint8)
    packed[:, 0] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    packed[:, 1] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    return packed.reshape(len(rows), -1)


def scales(rows: Bytes, *, kind: str) -> Bytes:
    """Return the bytes of `weight_scale`, fp16. [R, row bytes] -> [R, blocks x 2]"""
    return np.ascontiguousarray(blocks_of(rows, kind=kind)["scale"]).view(np.uint8).reshape(len(rows), -1)
