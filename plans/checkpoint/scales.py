"""Quantised weights and what they cannot be read without."""

import re
from collections.abc import Iterable, Mapping

from plans.checkpoint.header import TensorEntry
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError, printable

PACKED_NAMES = ("weight", "weight_packed", "qweight")
"""What formats call the numbers of a linear layer: FP8, bitsandbytes; compressed-tensors; GPTQ and AWQ."""
_SCALE = re.compile(r".*scale.*|.*absmax|SCB")
_OTHER_SCALE = re.compile(r"[kqv]_scale|.*(input|output|act|global).*|.*_2")
"""Of activations or of a cache, and the second one of NVFP4."""
_FP8_SCALES = ("weight_scale", "weight_scale_inv", "scale", "scale_weight")
_TRANSPOSED_PARTS = ("scales", "qzeros")
"""What GPTQ and AWQ store beside every `qweight`, symmetric or not."""
_SECOND_SCALES = ("weight_scale_2", "weight_global_scale")
"""Of NVFP4, whose scales of 16 weights are FP8 themselves."""


def lost_parts(tensors: Mapping[str, TensorEntry]) -> tuple[tuple[str, str], ...]:
    """Return the quantised weights that lack a tensor, in name order, each with what it lacks.

    A scale is named after its weight's module: `lm_head.weight_scale`, `lm_head.scales`, `lm_head.weight.absmax`.
    """
    scaled = {_module_of(name) for name in tensors if _is_scale(name.rpartition(".")[2])}
    needy = (name for name in sorted(tensors) if _needs_scale(name, tensors[name]))
    found = ((name, _lost_part(name, tensors, has_scale=name.rpartition(".")[0] in scaled)) for name in needy)
    return tuple((name, lost) for name, lost in found if lost is not None)


def _lost_part(weight: str, tensors: Mapping[str, TensorEntry], *, has_scale: bool) -> str | None:
    module, _, own = weight.rpartition(".")
    if own == "qweight":
        return next((f"{module}.{part}" for part in _TRANSPOSED_PARTS if f"{module}.{part}" not in tensors), None)
    if not has_scale:
        return "scale"
    scale = tensors.get(f"{module}.weight_scale")
    is_twice = tensors[weight].dtype == "U8" and scale is not None and scale.dtype == "F8_E4M3"
    if is_twice and not any(f"{module}.{part}" in tensors for part in _SECOND_SCALES):
        return f"{module}.{_SECOND_SCALES[0] if own == 'weight' else _SECOND_SCALES[1]}"
    return None


def check_scaled(tensors: Mapping[str, TensorEntry], *, where: object) -> None:
    """Require that quantised weights are whole: without their scales and zero points they are no weights.

    Args:
        tensors: of a checkpoint with a `quantization_config`.
        where: its folder.

    Raises:
        InputError: (E-SCALES) naming the first weight that lacks a tensor, and the tensor.
    """
    for weight, lost in lost_parts(tensors):
        raise InputError(
            f"{printable(weight)} is quantised ({tensors[weight].dtype}) and has no {printable(lost)}",
            where=where,
            hint="the checkpoint is incomplete; fetch it again",
            code="E-SCALES",
        )


def check_scales_are_meant(tensors: Mapping[str, TensorEntry], *, where: object) -> None:
    """Refuse FP8 and NVFP4 weights with scales where config.json says nothing of quantisation.

    transformers reads such FP8 weights as floats, which they are not; engines that know better learn it from a file of
    their own (`hf_quant_config.json` of NVIDIA's tools).

    Args:
        tensors: of a checkpoint without `quantization_config`.
        where: its folder.

    Raises:
        InputError: (E-SCALES) naming the first such weight and its scale, and the table that says what they are.
    """
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or not (entry.dtype.startswith("F8_") or entry.dtype == "U8"):
            continue
        scale = next((f"{module}.{own}" for own in _FP8_SCALES if f"{module}.{own}" in tensors), None)
        if scale is None or (entry.dtype == "U8" and tensors[scale].dtype != "F8_E4M3"):
            continue
        is_in_blocks = scale.endswith("_inv")
        table = (
            '{"quant_method": "fp8", "weight_block_size": [128, 128]}'
            if is_in_blocks
            else (f'{{"quant_method": "modelopt", "quant_algo": "{"NVFP4" if entry.dtype == "U8" else "FP8"}"}}')
        )
        raise InputError(
            f"{printable(name)} is {entry.dtype} with a scale ({printable(scale)}), and config.json has no "
            "quantization_config: what it means is not said",
            where=where,
            expected=f'"quantization_config": {table} in config.json, or what else the weights were quantised by',
            hint="hf_quant_config.json tells where there is one; analyze and solve size the weights then",
            code="E-SCALES",
        )


def is_stored(weight: str, names: Iterable[str]) -> bool:
    """Return whether a weight is among `names`, packed or as it is."""
    module = weight.removesuffix("weight")
    return not {module + packed for packed in PACKED_NAMES}.isdisjoint(names)


def _needs_scale(name: str, entry: TensorEntry) -> bool:
    own = name.rpartition(".")[2]
    dtype = STORED_DTYPES[entry.dtype]
    return own in PACKED_NAMES and len(entry.shape) >= 2 and (dtype.size_bytes == 1 or not dtype.is_float)


def _is_scale(own: str) -> bool:
    return bool(_SCALE.fullmatch(own)) and not _OTHER_SCALE.fullmatch(own)


def _module_of(scale: str) -> str:
    module = scale.rpartition(".")[0]
    outer, _, own = module.rpartition(".")
    return outer if own in PACKED_NAMES else module
