"""What packed tensors stand for where the family's own shapes are not known, and how known ones are stored.

Sources: OCP Microscaling (MXFP4: two values in a byte, one scale of a byte per 32), NVIDIA's NVFP4 (two in a byte, one
FP8 scale per 16), GPTQ and AWQ (32 / bits values in an I32), bitsandbytes (two 4-bit values, or one of 8 bits, in a
byte), DeepSeek's and compressed-tensors' FP8 and W8A8 (a value in a byte).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from plans.checkpoint.scales import PACKED_NAMES
from plans.config.config import ModelConfig
from plans.dtypes import DTYPES, STORED_DTYPES
from plans.errors import InputError, printable
from plans.packed.scheme import PACKED, SCALE, SHAPE

Shape = tuple[int, ...]
Row = tuple[str, Shape]
WORD_BITS = 32
VALUES_PER_BYTE = 2
BITS_PER_BYTE = 8
MAX_GROUP = 1 << 20
MATRIX = 2
_SCALES = re.compile(
    r".*(_scales?(_inv|_2)?|\.scales|\.qzeros|\.g_idx|\.input_scale|\.absmax|\.SCB|\.nested_absmax|\.quant_map"
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
    is_weight = name.rpartition(".")[2] in PACKED_NAMES
    if STORED_DTYPES[dtype].is_float or (len(shape) < MATRIX and not is_weight):
        return shape
    if config.quantization is not None or name.endswith("_blocks"):
        found = _four_bits(name, row, rows, config) or _eight_bits(name, row, rows, config)
        if found is not None:
            return found
    if dtype == "U8" and config.quantization == "bitsandbytes" and f"{name}.absmax" in rows:
        return (math.prod(shape) * VALUES_PER_BYTE, 1)
    if dtype == "I32" and name.endswith((".qweight", ".weight_packed")) and _said(config, "bits", "num_bits") > 0:
        return _unpacked(name, shape, rows, config)
    raise InputError(
        f"{printable(name)} holds {dtype} of shape {list(shape)} (quant_method {config.quantization or 'none'}), and "
        "how many weights that is is not understood",
        where="config.json:/quantization_config",
        hint="this model cannot be sized here",
        code="E-PACKED",
    )


def _four_bits(name: str, row: Row, rows: Mapping[str, Row], config: ModelConfig) -> Shape | None:
    """The weights of bytes that hold two each, if the scales are as many as MXFP4 or NVFP4 has for them."""
    dtype, shape = row
    if dtype != "U8" or len(shape) < MATRIX:
        return None
    if name.endswith("_blocks"):
        weights = (*shape[:-2], shape[-2] * shape[-1] * VALUES_PER_BYTE)
        kind, scales = rows.get(name.removesuffix("blocks") + "scales", ("", ()))
    else:
        weights = (*shape[:-1], shape[-1] * VALUES_PER_BYTE)
        kind, scales = rows.get(name.rpartition(".")[0] + ".weight_scale", ("", ()))
    group = _SCALED_GROUPS.get(kind, 0)
    agrees = _said(config, "bits", "num_bits") in (0, 4) and _said(config, "group_size") in (0, group)
    return weights if group and agrees and (*scales[:-1], scales[-1] * group) == weights else None


_SCALED_GROUPS: Mapping[str, int] = {"U8": 32, "F8_E8M0": 32, "F8_E4M3": 16}
"""Dtype of a scale -> how many 4-bit floats share it."""


def _eight_bits(name: str, row: Row, rows: Mapping[str, Row], config: ModelConfig) -> Shape | None:
    """The weights of whole numbers of 8 bits, if there is a scale for all, for each row, or for each group in a row."""
    dtype, shape = row
    module, _, part = name.rpartition(".")
    if dtype != "I8" or part != "weight" or len(shape) != MATRIX:
        return None
    scales = next((rows[n][1] for n in (f"{module}.weight_scale", f"{module}.SCB") if n in rows), None)
    group = _said(config, "group_size")
    usual = ((), (1,), shape[:1], (shape[0], 1), *([(shape[0], shape[1] // group)] if group else []))
    return shape if scales in usual and _said(config, "bits", "num_bits") in (0, 8) else None


def can_hold(row: Row, weights: Shape) -> bool:
    """Return whether a stored tensor can be the weights of this shape, in whatever way they are quantised.

    Floats lie as they are; whole numbers take a whole number of bits for each weight, and words of 32 bits leave one
    side of a matrix as it is.

    >>> can_hold(("I32", (8, 24)), (24, 64)), can_hold(("I32", (8, 48)), (24, 64)), can_hold(("F16", (8, 8)), (4, 8))
    (True, False, False)
    """
    dtype, shape = row
    if STORED_DTYPES[dtype].is_float or len(weights) != MATRIX:
        return shape == weights
    stored_bits, count = math.prod(shape) * STORED_DTYPES[dtype].size_bytes * BITS_PER_BYTE, math.prod(weights)
    if stored_bits % count or not 0 < stored_bits // count <= BITS_PER_BYTE:
        return False
    if dtype != "I32" or len(shape) != MATRIX:
        return True
    (out, in_), bits = weights, stored_bits // count
    down, along = (in_ * bits // WORD_BITS, out), (in_, out * bits // WORD_BITS)  # GPTQ, AWQ
    return shape in {down, along, (out, in_ * bits // WORD_BITS)}


def _has_packed_sibling(name: str, rows: Mapping[str, Row]) -> bool:
    return name.endswith("_scales") and name[:-6] + "blocks" in rows


def _unpacked(name: str, shape: Shape, rows: Mapping[str, Row], config: ModelConfig) -> Shape:
    """The shape that `bits` and the scales agree on: one of a group of columns for every output.

    Layers may be packed in other bits than the configuration's own (GPTQModel's `dynamic`, AutoRound's `extra_config`);
    the scales tell on them.
    """
    bits, group = _said(config, "bits", "num_bits"), _said(config, "group_size")
    module, _, part = name.rpartition(".")
    per_output = "weight_scale" if part == "weight_packed" else "scales"
    _, scale = rows.get(f"{module}.{per_output}", ("", ()))
    *stack, first, last = shape
    if part == "weight_packed":
        ways = [(first, last * WORD_BITS, scale[-2:])]  # outputs, columns in bits, one scale per output and group
    else:  # scales lie across: GPTQ packs down the columns, AWQ along the outputs
        ways = [(last, first * WORD_BITS, scale[-2:][::-1])]
        if last * WORD_BITS % bits == 0:
            ways.append((last * WORD_BITS // bits, first * bits, scale[-2:][::-1]))
    for out, in_bits, found in ways:
        in_ = in_bits // bits
        if in_bits % bits == 0 and found == (out, -(-in_ // group) if group > 0 else 1):
            return (*stack, out, in_)
    raise InputError(
        f"{printable(name)} of shape {list(shape)} and {printable(module)}.{per_output} of shape {list(scale)} are not "
        f"{bits} bits in groups of {group if group > 0 else 'a whole row'}, as config.json says",
        where="config.json:/quantization_config",
        hint="this model cannot be sized here",
        code="E-PACKED",
    )


def _said(config: ModelConfig, *names: str) -> int:
    """A number from where GPTQ, AWQ or compressed-tensors say it, in all groups alike; 0 where nothing does."""
    table: Any = config.raw.get("quantization_config")
    groups = table.get("config_groups") if isinstance(table, dict) else None
    tables = [table]
    if isinstance(groups, dict) and groups:
        tables = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    found = {_number(table, names) for table in tables}
    return found.pop() if len(found) == 1 else 0


def _number(table: Any, names: tuple[str, ...]) -> int:
    found = next((table[name] for name in names if table.get(name)), 0) if isinstance(table, dict) else 0
    return found if type(found) is int and 0 < found <= MAX_GROUP else 0
