"""Blocks of GGUF tensors -> the weights they stand for, in fp32 as ggml computes them.

A row is a run of blocks of 32 or 256 weights. Each type is a scale times whole numbers, some less or more a minimum;
the K types hold two levels of scales. Source: the structures of ggml-common.h and the functions `dequantize_row_*` of
ggml-quants.c in llama.cpp; compared to the bit with the package `gguf` in tests/exporter/foreign.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.foreign.numbers import Bytes, Floats

Blocks = NDArray[np.void]

_HALF = "<f2"

_Field = tuple[str, str] | tuple[str, str, int | tuple[int, int]]
_TWO: tuple[_Field, ...] = (("scale", _HALF), ("minimum", _HALF))
_FIELDS: Mapping[str, tuple[_Field, ...]] = {
    "Q4_0": (("scale", _HALF), ("low", "u1", 16)),
    "Q4_1": (*_TWO, ("low", "u1", 16)),
    "Q5_0": (("scale", _HALF), ("high", "u1", 4), ("low", "u1", 16)),
    "Q5_1": (*_TWO, ("high", "u1", 4), ("low", "u1", 16)),
    "Q8_0": (("scale", _HALF), ("whole", "i1", 32)),
    "Q2_K": (("scales", "u1", 16), ("low", "u1", (2, 32)), *_TWO),
    "Q3_K": (("high", "u1", 32), ("low", "u1", (2, 32)), ("scales", "u1", 12), ("scale", _HALF)),
    "Q4_K": (*_TWO, ("scales", "u1", 12), ("low", "u1", (4, 32))),
    "Q5_K": (*_TWO, ("scales", "u1", 12), ("high", "u1", 32), ("low", "u1", (4, 32))),
    "Q6_K": (("low", "u1", (2, 64)), ("high", "u1", (2, 32)), ("scales", "i1", 16), ("scale", _HALF)),
}

LAYOUTS: Mapping[str, np.dtype[Any]] = {name: np.dtype(list(fields)) for name, fields in _FIELDS.items()}
"""Type -> the fields of one block."""


def dequantise(rows: Bytes, *, kind: str) -> Floats:
    """Return the weights of whole rows.

    Args:
        rows: the bytes as they lie in the file. [R, row bytes]
        kind: a type of `LAYOUTS`, or F32, F16 or BF16.

    Returns:
        The weights. [R, C]

    Example:
        >>> dequantise(np.array([[0, 60, *range(32)]], np.uint8), kind="Q8_0")[0, :3].tolist()
        [0.0, 1.0, 2.0]
    """
    if kind in _PLAIN:
        return _PLAIN[kind](np.ascontiguousarray(rows))
    with np.errstate(over="ignore", invalid="ignore"):  # scales that are no numbers are named where they are written
        return _WEIGHTS[kind](blocks_of(rows, kind=kind)).reshape(len(rows), -1)


def blocks_of(rows: Bytes, *, kind: str) -> Blocks:
    """Return the blocks of whole rows, one after the other. [R x blocks]"""
    return np.ascontiguousarray(rows).reshape(-1).view(LAYOUTS[kind])


def _bf16(rows: Bytes) -> Floats:
    return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _scale(blocks: Blocks, name: str = "scale") -> Floats:
    found: Floats = blocks[name].astype(np.float32)[:, None]
    return found


def _planes(data: Bytes, *, bits: int, count: int) -> Bytes:
    """Return `count` numbers of so many bits out of each byte, the lowest first. [..., W] -> [..., count, W]"""
    data = np.ascontiguousarray(data)
    found = np.empty((*data.shape[:-1], count, data.shape[-1]), np.uint8)
    for place in range(count):  # one after the other: long runs are quick, short last dimensions are not
        found[..., place, :] = (data >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1)
    return found


def _nibbles(blocks: Blocks) -> Bytes:
    """The low halves of all bytes, then the high ones. [N, 32]"""
    return _planes(blocks["low"], bits=4, count=2).reshape(len(blocks), 32)


def _fifth_bits(blocks: Blocks) -> Bytes:
    return np.unpackbits(blocks["high"], axis=-1, bitorder="little") << np.uint8(4)


def _whole(numbers: Bytes, *, less: int) -> Floats:
    found = numbers.astype(np.float32)
    return np.subtract(found, np.float32(less), out=found)


def _q4_0(blocks: Blocks) -> Floats:
    return _scale(blocks) * _whole(_nibbles(blocks), less=8)


def _q4_1(blocks: Blocks) -> Floats:
    return _scale(blocks) * _whole(_nibbles(blocks), less=0) + _scale(blocks, "minimum")


def _q5_0(blocks: Blocks) -> Floats:
    return _scale(blocks) * _whole(_nibbles(blocks) | _fifth_bits(blocks), less=16)


def _q5_1(blocks: Blocks) -> Floats:
    return _scale(blocks) * _whole(_nibbles(blocks) | _fifth_bits(blocks), less=0) + _scale(blocks, "minimum")


def _q8_0(blocks: Blocks) -> Floats:
    return _scale(blocks) * np.ascontiguousarray(blocks["whole"]).astype(np.float32)


def _grouped(numbers: Bytes, *, less: int, groups: int) -> Floats:
    """Whole numbers in the groups that share a scale. [N, groups, 256 / groups]"""
    return _whole(numbers, less=less).reshape(len(numbers), groups, -1)


def _q2_k(blocks: Blocks) -> Floats:
    low = _planes(blocks["low"], bits=2, count=4)
    scale = _scale(blocks) * (blocks["scales"] & 15).astype(np.float32)
    minimum = _scale(blocks, "minimum") * (blocks["scales"] >> 4).astype(np.float32)
    return scale[..., None] * _grouped(low, less=0, groups=16) - minimum[..., None]


def _q3_k(blocks: Blocks) -> Floats:
    low = _planes(blocks["low"], bits=2, count=4).reshape(len(blocks), 8, 32)
    high = _planes(blocks["high"], bits=1, count=8)
    scale = _scale(blocks) * _whole(_scales_of_q3_k(blocks["scales"]), less=32)
    return scale[..., None] * _grouped(low | (high << np.uint8(2)), less=4, groups=16)


def _scales_of_q3_k(packed: Bytes) -> Bytes:
    """Sixteen numbers of six bits: four bits of each in the first eight bytes, two in the last four. [N, 16]"""
    low = _planes(packed[:, :8], bits=4, count=2).reshape(-1, 16)
    high = _planes(packed[:, 8:], bits=2, count=4).reshape(-1, 16)
    return low | (high << np.uint8(4))


def _q4_k(blocks: Blocks) -> Floats:
    return _scaled_twice(blocks, _planes(blocks["low"], bits=4, count=2).reshape(len(blocks), 8, 32))


def _q5_k(blocks: Blocks) -> Floats:
    low = _planes(blocks["low"], bits=4, count=2).reshape(len(blocks), 8, 32)
    return _scaled_twice(blocks, low | (_planes(blocks["high"], bits=1, count=8) << np.uint8(4)))


def _scaled_twice(blocks: Blocks, numbers: Bytes) -> Floats:
    """Eight groups; their scales and minima are numbers of six bits times the block's own."""
    first, second, upper = (blocks["scales"][:, start : start + 4] for start in (0, 4, 8))
    scales = np.concatenate([first & 63, (upper & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (upper >> 4) | (second >> 6 << 4)], axis=1)
    scale = _scale(blocks) * scales.astype(np.float32)
    minimum = _scale(blocks, "minimum") * minima.astype(np.float32)
    return scale[..., None] * _grouped(numbers, less=0, groups=8) - minimum[..., None]


def _q6_k(blocks: Blocks) -> Floats:
    low = _planes(blocks["low"], bits=4, count=2).reshape(len(blocks), 2, 4, 32)
    high = _planes(blocks["high"], bits=2, count=4)
    scale = _scale(blocks) * blocks["scales"].astype(np.float32)
    return scale[..., None] * _grouped(low | (high << np.uint8(4)), less=32, groups=16)


_PLAIN: Mapping[str, Callable[[Bytes], Floats]] = {
    "F32": lambda rows: rows.view("<f4"),
    "F16": lambda rows: rows.view(_HALF).astype(np.float32),
    "BF16": _bf16,
}
_WEIGHTS: Mapping[str, Callable[[Blocks], Floats]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
