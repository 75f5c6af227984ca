"""What packed tensors stand for where the family's own shapes are not known, and how known ones are stored.

Sources: OCP Microscaling (MXFP4: two values in a byte, one scale per 32), GPTQ and AWQ (32 / bits values in an I32),
bitsandbytes (two 4-bit values in a byte), DeepSeek's and compressed-tensors' FP8 (a value in a byte).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from plans.config.config import ModelConfig
from plans.dtypes import DTYPES, STORED_DTYPES
from plans.errors import InputError, printable
from plans.packed.scheme import PACKED, SCALE, SHAPE

Shape = tuple[int, ...]
Row = tuple[str, Shape]
WORD_BITS = 32
VALUES_PER_BYTE = 2
MATRIX = 2
_SCALES = re.compile(
    r".*(_scales?(_inv|_2)?|\.scales|\.qzeros|\.g_idx|\.input_scale|\.absmax|\.nested_absmax|\.quant_map"
    r"|\.nested_quant_map|\.quant_state\..*|\.weight_zero_point|\.weight_shape|\.weight_g_idx)"
)


def stored_rows(shapes: Mapping[str, Shape], config: ModelConfig, *, prefix: str) -> dict[str, Row]:
    """Return the tensors in which weights of these shapes are stored, a scale in the dtype of the model.

    Args:
        shapes: of one unit, by local tensor name.
        config: says the dtype, and which matrices are packed.
        prefix: what comes before the local names, such as `model.layers.3.`.

    Raises:
        InputError: (E-QUANT) a matrix that its scheme does not divide.
    """
    stored, packing, rows = DTYPES[config.dtype].stored, config.packing, dict[str, Row]()
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        scheme = packing.scheme_of(prefix + module) if packing is not None and part == "weight" else None
        if scheme is None or (module == "lm_head" and config.tie_word_embeddings):
            rows[name] = (stored, shape)
            continue
        out, in_ = shape
        if not scheme.can_pack(out, in_):
            what = f"{prefix}{module} has {in_} columns, which {scheme.words} does not divide"
            raise InputError(what, where="config.json:/quantization_config", code="E-QUANT")
        rows[f"{module}.{PACKED}"] = ("I32", scheme.packed_shape(out, in_))
        rows[f"{module}.{SCALE}"] = (stored, scheme.scale_shape(out, in_))
        rows[f"{module}.{SHAPE}"] = ("I64", (2,))
    return rows


def logical_shape(name: str, row: Row, rows: Mapping[str, Row], config: ModelConfig) -> Shape:
    """Return the shape of the weights a stored tensor stands for; scales stand for none.

    Raises:
        InputError: whole numbers that hold weights in a way which is not known.
    """
    dtype, shape = row
    if _SCALES.fullmatch(name) and (config.quantization is not None or _has_packed_sibling(name, rows)):
        return (0,)
    if dtype == "U8" and name.endswith("_blocks") and len(shape) >= MATRIX and name[:-6] + "scales" in rows:
        return (*shape[:-2], shape[-2] * shape[-1] * VALUES_PER_BYTE)
    if STORED_DTYPES[dtype].is_float or len(shape) < MATRIX:
        return shape
    bits = _bits(config)
    if dtype == "U8" and config.quantization == "bitsandbytes" and f"{name}.absmax" in rows:
        return (math.prod(shape) * VALUES_PER_BYTE, 1)
    if dtype == "I32" and name.endswith((".qweight", ".weight_packed")) and bits:
        return (*shape[:-1], shape[-1] * WORD_BITS // bits)
    raise InputError(
        f"{printable(name)} holds {dtype} of shape {list(shape)} (quant_method {config.quantization or 'none'}), and "
        "how many weights that is is not understood",
        where="config.json:/quantization_config",
        hint="this model cannot be sized here",
        code="E-PACKED",
    )


def _has_packed_sibling(name: str, rows: Mapping[str, Row]) -> bool:
    return name.endswith("_scales") and name[:-6] + "blocks" in rows


def _bits(config: ModelConfig) -> int:
    """Bits per weight, from where GPTQ, AWQ or compressed-tensors say it; 0 where nothing does."""
    table: Any = config.raw.get("quantization_config")
    if not isinstance(table, dict):
        return 0
    groups = table.get("config_groups")
    if isinstance(groups, dict) and len(groups) == 1:
        group = next(iter(groups.values()))
        table = group.get("weights") if isinstance(group, dict) else None
    found = (table.get("bits") or table.get("num_bits")) if isinstance(table, dict) else None
    return found if type(found) is int and 0 < found <= WORD_BITS else 0
