"""Every dtype in one table: its size, and how we, safetensors, torch and ggml spell it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DtypeName = Literal["fp32", "fp16", "bf16"]
"""Our names, of the dtypes the runtime computes in."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype; a spelling is empty where nobody asks for it."""

    stored: str
    """In safetensors headers."""
    size_bytes: int
    torch: str = ""
    """In torch and in `config.json`."""
    name: DtypeName | None = None
    ggml: str = ""

    @property
    def is_float(self) -> bool:
        """Whether it holds weights that can be converted; F8_E8M0 holds the scales of quantised ones."""
        return "float" in self.torch


_TABLE = (
    Dtype("BF16", 2, "bfloat16", "bf16", "bf16"),
    Dtype("F16", 2, "float16", "fp16", "f16"),
    Dtype("F32", 4, "float32", "fp32", "f32"),
    Dtype("F64", 8, "float64"),
    Dtype("F8_E4M3", 1, "float8_e4m3fn"),
    Dtype("F8_E5M2", 1, "float8_e5m2"),
    Dtype("F8_E8M0", 1),
    *(Dtype("BOOL", 1), Dtype("I8", 1), Dtype("U8", 1), Dtype("I16", 2), Dtype("U16", 2)),
    *(Dtype("I32", 4), Dtype("U32", 4), Dtype("I64", 8, "int64"), Dtype("U64", 8)),
)

DTYPES: Mapping[str, Dtype] = {row.name: row for row in _TABLE if row.name}
"""By our name: those the runtime computes in."""

STORED_DTYPES: Mapping[str, Dtype] = {row.stored: row for row in _TABLE}
"""By their name in safetensors headers: all that can be sized."""

DTYPE_NAMES: Mapping[str, DtypeName] = {text: row.name for row in _TABLE if row.name for text in (row.torch, row.name)}
"""Our name of a dtype the runtime computes in, from torch's spelling or ours."""
