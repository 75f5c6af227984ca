"""The tensors of a GGUF file -> those of the checkpoint that it becomes, each with how it is made.

F32, F16 and BF16 stay as they are, and Q8_0 and Q4_0 matrices are packed to the bit; a table of Q8_0 or Q4_0 that is
looked up, or shared by the head, becomes fp16. Everything else has no packed form, and is written on request alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from exporter.foreign.gguf.blocks import LAYOUTS, dequantise
from exporter.foreign.gguf.repack import SCHEMES, packed_numbers, scales
from exporter.foreign.made import Constant, Made, Read
from exporter.foreign.numbers import Bytes, Floats, narrowed
from exporter.foreign.rounding import RoundingErrors
from plans.checkpoint.units import StoredTensor
from plans.errors import IntegrityError
from plans.packed.rounding import Rounded, round_to_nearest
from plans.packed.scheme import INT8, PACKED, SCALE, SHAPE, Scheme, is_linear

Requantise = Literal["bf16", "int8"]
FLOATS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of GGUF that safetensors has too -> torch's spelling."""
_IN_PAIRS = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(?:weight|bias)")


@dataclass(slots=True)
class Becoming:
    """What the tensors of a file become."""

    dtype: str
    """The model's, a key of `FLOATS`."""
    kept: dict[str, StoredTensor] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    """Packed modules."""
    lost: Counter[str] = field(default_factory=Counter)
    """Types that have no form without loss -> tensors of them."""
    errors: RoundingErrors = field(default_factory=RoundingErrors)

    @property
    def plain_linears(self) -> list[str]:
        """Linear layers that are not packed."""
        names = (*self.kept, *(made.name for made in self.made))
        modules = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        return [module for module in modules if is_linear(module)]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        kept = sum(stored.entry.size_bytes for stored in self.kept.values())
        return kept + sum(made.num_rows * made.row_bytes for made in self.made)


def become(
    tensors: Mapping[str, StoredTensor], *, head_dim: int, interleaves: bool, requantise: Requantise | None
) -> Becoming:
    """Say what becomes of every tensor; nothing is read.

    Args:
        tensors: by the names the model has for them, in the file's own types.
        head_dim: rows of a head.
        interleaves: whether rows of q and k lie in pairs in the file.
        requantise: what becomes of types without a packed form; None to count them in `lost`.
    """
    found = Becoming(model_dtype(tensors, requantise))
    for name, stored in tensors.items():
        pairs = head_dim if interleaves and _IN_PAIRS.fullmatch(name) else 0
        _add(found, _Rows(name, stored, pairs), requantise)
    return found


def model_dtype(tensors: Mapping[str, StoredTensor], requantise: Requantise | None) -> str:
    """Return the dtype of the whole: bf16 where asked for, fp16 beside fp16 scales, else the narrowest float."""
    kinds = {stored.entry.dtype for stored in tensors.values()}
    if requantise == "bf16" or (kinds <= FLOATS.keys() and "BF16" in kinds):
        return "BF16"
    return "F32" if kinds == {"F32"} else "F16"


@dataclass(frozen=True, slots=True)
class _Rows:
    """A stored tensor whose rows are read in the order that the model has them; a vector's elements are its rows."""

    name: str
    stored: StoredTensor
    pairs: int
    """Rows of a head where they lie in pairs, otherwise 0."""

    @property
    def kind(self) -> str:
        return self.stored.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.entry.shape

    def read(self, read: Read, first: int, last: int) -> Bytes:
        """Return whole rows. [last - first, row bytes]"""
        entry = self.stored.entry
        row_bytes = entry.size_bytes // self.shape[0]
        data = bytearray((last - first) * row_bytes)
        read(self.stored.file, memoryview(data), entry.begin + first * row_bytes)
        rows = np.frombuffer(data, np.uint8).reshape(last - first, row_bytes)
        return apart(rows, head_dim=self.pairs) if self.pairs else rows


def apart(rows: Bytes, *, head_dim: int) -> Bytes:
    """Undo the order of rotary pairs: row 2i + j of a head becomes row i + j * head_dim / 2. [R, B] -> [R, B]

    Source: `LlamaModel.permute` of convert_hf_to_gguf.py.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class _Made:
    """Rows that are read and then changed, or a vector whose rows are its elements."""

    source: _Rows
    change: Callable[[Bytes], Bytes]

    def rows(self, read: Read, first: int, last: int) -> Bytes:
        if len(self.source.shape) == 1:
            return self.change(self.source.read(read, 0, self.source.shape[0])).reshape(1, -1)
        return self.change(self.source.read(read, first, last))


def _add(found: Becoming, rows: _Rows, requantise: Requantise | None) -> None:
    kind, module = rows.kind, rows.name.removesuffix(".weight")
    if kind not in FLOATS and (kind not in LAYOUTS or (requantise is None and kind not in SCHEMES)):
        found.lost[kind] += 1
    elif requantise == "bf16":
        _plain(found, rows, "BF16")
    elif kind in FLOATS:
        _plain(found, rows, kind)
    elif not is_linear(module):
        _plain(found, rows, found.dtype)
    elif kind in SCHEMES:
        _packed(found, module, rows, SCHEMES[kind], _repacked(rows))
    else:
        _packed(found, module, rows, INT8, _rounded(found.errors, rows))


def _plain(found: Becoming, rows: _Rows, dtype: str) -> None:
    if dtype == rows.kind and not rows.pairs:
        found.kept[rows.name] = rows.stored
        return
    change = _unchanged if dtype == rows.kind else partial(_as_floats, found.errors, rows, dtype)
    found.made.append(
        Made(rows.name, dtype, rows.shape, _Made(rows, change), rows.stored.file, unit_rows=rows.pairs or 1)
    )


Parts = tuple[Callable[[Bytes], Bytes], Callable[[Bytes], Bytes]]
"""Rows of the file -> bytes of the packed numbers, and of their scales."""


def _packed(found: Becoming, module: str, rows: _Rows, scheme: Scheme, parts: Parts) -> None:
    out, columns = rows.shape
    file, unit = rows.stored.file, rows.pairs or 1
    sides = np.array([out, columns], "<i8").tobytes()
    numbers, scale = (_Made(rows, part) for part in parts)
    found.schemes[module] = scheme
    found.made += [
        Made(f"{module}.{PACKED}", "I32", scheme.packed_shape(out, columns), numbers, file, unit_rows=unit),
        Made(f"{module}.{SCALE}", "F16", scheme.scale_shape(out, columns), scale, file, unit_rows=unit),
        Made(f"{module}.{SHAPE}", "I64", (2,), Constant(sides), file),
    ]


def _unchanged(rows: Bytes) -> Bytes:
    return rows


def _as_floats(errors: RoundingErrors, rows: _Rows, dtype: str, data: Bytes) -> Bytes:
    weights = _weights(rows, data)
    written = narrowed(weights, dtype=dtype)
    errors.compare(rows.name, weights, dequantise(written, kind=dtype))
    return written


def _repacked(rows: _Rows) -> Parts:
    return partial(packed_numbers, kind=rows.kind), partial(_own_scales, rows)


def _own_scales(rows: _Rows, data: Bytes) -> Bytes:
    found = scales(data, kind=rows.kind)
    _require_finite(rows, dequantise(found, kind="F16"))
    return found


def _rounded(errors: RoundingErrors, rows: _Rows) -> Parts:
    def rounded(data: Bytes) -> Rounded:
        weights = memoryview(_weights(rows, data).reshape(-1).data).cast("B")
        return round_to_nearest(weights, stored="F32", scheme=INT8, scale="F16", name=rows.stored.name)

    def numbers(data: Bytes) -> Bytes:
        found = rounded(data)
        errors.add(rows.name, moved=found.squared_error, size=found.squared)
        return np.frombuffer(found.words, np.uint8).reshape(len(data), -1)

    return numbers, lambda data: np.frombuffer(rounded(data).scales, np.uint8).reshape(len(data), -1)


def _weights(rows: _Rows, data: Bytes) -> Floats:
    found = dequantise(data, kind=rows.kind)
    if rows.kind in LAYOUTS:
        _require_finite(rows, found)
    return found


def _require_finite(rows: _Rows, numbers: Floats) -> None:
    if not np.isfinite(numbers).all():
        raise IntegrityError(
            f"{rows.stored.name} holds scales that are no numbers",
            where=rows.stored.file,
            hint="the file is damaged; fetch it again",
            code="E-VALUES",
        )
