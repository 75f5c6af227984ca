"""Packed layers in a checkpoint: are their tensors whole, by the headers, and which keep their stored dtype?"""

from collections.abc import Iterable, Mapping

from plans.checkpoint.header import TensorEntry
from plans.config.config import ModelConfig
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError, printable
from plans.packed.choice import SIDE
from plans.packed.config import Packing
from plans.packed.scheme import PACKED, PACKED_PARTS, SCALE, SHAPE, WORD_BITS, Scheme, is_expert_scale

_DTYPES = {PACKED: ("I32",), SCALE: ("BF16", "F16", "F32"), SHAPE: ("I64",)}
_FOREIGN = {
    "weight_zero_point": "zero points",
    "weight_g_idx": "columns in another order (act-order)",
    "g_idx": "columns in another order (act-order)",
    "weight_global_scale": "a scale of scales",
    "input_scale": "a scale of activations",
    "output_scale": "a scale of activations",
}
"""Tensors that change what the packed numbers mean."""
_TOGETHER = (".experts.gate_up_proj", ".experts.down_proj")


def is_kept(name: str, dtype: str, config: ModelConfig) -> bool:
    """Return whether a tensor of a stored dtype is used in it, instead of in the model's.

    Whole numbers and the scales of experts are. Other floats, packed layers' scales among them, are converted, but for
    weights that are quantised in a way the runtime does not read.
    """
    is_foreign = config.quantization is not None and config.packing is None
    return is_foreign or not STORED_DTYPES[dtype].is_float or is_expert_scale(name)


def expert_fault(config: ModelConfig, names: Iterable[str]) -> str | None:
    """Return why the experts of a model cannot be packed, for people; None where they can, or there are none.

    Args:
        config: of the model.
        names: of its tensors.
    """
    if config.num_experts and any(name.endswith(_TOGETHER) for name in names):
        return "the experts of a layer lie in one tensor, and packed ones are stored one by one"
    sides = (config.hidden_size, config.expert_intermediate_size)
    if config.num_experts and any(side % SIDE for side in sides):
        return f"its experts have sides of {sides[0]} and {sides[1]}, and packed ones need multiples of {SIDE}"
    return None


def check_packed(tensors: Mapping[str, TensorEntry], packing: Packing, *, where: object) -> None:
    """Require that packed layers are whole, and packed as the configuration says.

    Raises:
        InputError: (E-SCALES, E-QUANT, E-DTYPE, E-SHAPE) naming the tensor.
    """
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _FOREIGN:
            raise _refused(f"{printable(name)} holds {_FOREIGN[part]}, which are not read", where, "E-QUANT")
        if part in PACKED_PARTS:
            modules.setdefault(module, {})[part] = entry
    for module, parts in modules.items():
        _check_module(module, parts, packing.scheme_of(module), where)


def _check_module(module: str, parts: Mapping[str, TensorEntry], scheme: Scheme | None, where: object) -> None:
    name = printable(module)
    missing = [part for part in PACKED_PARTS if part not in parts]
    if missing:
        found = next(iter(parts))
        raise _refused(f"{name}.{found} is there, and no {name}.{missing[0]}", where, "E-SCALES")
    if scheme is None:
        raise _refused(f"{name}.{PACKED} is packed, and quantization_config leaves {name} alone", where, "E-QUANT")
    for part, entry in parts.items():
        if entry.dtype not in _DTYPES[part]:
            expected = " or ".join(_DTYPES[part])
            raise _refused(f"{name}.{part} is {entry.dtype}; expected {expected}", where, "E-DTYPE")
    _check_shapes(name, {part: entry.shape for part, entry in parts.items()}, scheme, where)


def _check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme, where: object) -> None:
    packed = shapes[PACKED]
    if len(packed) != 2:
        raise _refused(f"{name}.{PACKED} has shape {list(packed)}; expected rows and columns", where, "E-SHAPE")
    out, in_ = packed[0], packed[1] * WORD_BITS // scheme.bits
    if not scheme.can_pack(out, in_):
        what = f"{name}.{PACKED} holds {in_} columns in {out} rows, which {scheme.words} does not divide"
        raise _refused(what, where, "E-QUANT")
    for part, expected in ((SCALE, scheme.scale_shape(out, in_)), (SHAPE, (2,))):
        if shapes[part] != expected:
            what = f"{name}.{part} has shape {list(shapes[part])}; expected {list(expected)} for {scheme.words}"
            raise _refused(what, where, "E-SHAPE")


def _refused(what: str, where: object, code: str) -> InputError:
    hint = "the checkpoint is incomplete, or its quantization_config is that of another model"
    return InputError(what, where=where, hint=hint, code=code)
