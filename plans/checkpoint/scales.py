"""Quantised weights and what they cannot be read without."""

from collections.abc import Iterable, Mapping

from plans.checkpoint.header import TensorEntry
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError, printable

PACKED_NAMES = ("weight", "weight_packed", "qweight")
"""What formats call the numbers of a linear layer: FP8, bitsandbytes; compressed-tensors; GPTQ and AWQ."""
_SCALES = ("scale", "absmax", "SCB")
_FP8_SCALES = ("weight_scale", "weight_scale_inv", "scale", "scale_weight")


def unscaled(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Return the quantised weights without a scale among `tensors`, in name order.

    A scale is named after its weight's module: `lm_head.weight_scale`, `lm_head.scales`, `lm_head.weight.absmax`.
    """
    scaled = {_module_of(name) for name in tensors if any(scale in name.rpartition(".")[2] for scale in _SCALES)}
    return tuple(n for n in sorted(tensors) if _needs_scale(n, tensors[n]) and n.rpartition(".")[0] not in scaled)


def check_scales_are_meant(tensors: Mapping[str, TensorEntry], *, where: object) -> None:
    """Refuse FP8 weights with scales where config.json says nothing of quantisation: read as floats they are others.

    Some tools say it in a file of their own, which nothing but their engine reads.

    Args:
        tensors: of a checkpoint without `quantization_config`.
        where: its folder.

    Raises:
        InputError: (E-SCALES) naming the first such weight and its scale.
    """
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or not entry.dtype.startswith("F8_"):
            continue
        scale = next((f"{module}.{own}" for own in _FP8_SCALES if f"{module}.{own}" in tensors), None)
        if scale is not None:
            raise InputError(
                f"{printable(name)} is {entry.dtype} with a scale ({printable(scale)}), and config.json has no "
                "quantization_config: what it means is not said",
                where=where,
                expected="a quantization_config with a quant_method such as fp8 or compressed-tensors",
                hint="take what the folder's hf_quant_config.json says, or the 16-bit original",
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


def _module_of(scale: str) -> str:
    module = scale.rpartition(".")[0]
    outer, _, own = module.rpartition(".")
    return outer if own in PACKED_NAMES else module
