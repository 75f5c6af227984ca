"""A folder of GPTQ or AWQ -> the checkpoint of packed weights that it becomes, where nothing is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.foreign.made import Constant, Made, MadeTensors
from exporter.foreign.origin import Origin
from exporter.foreign.transposed import (
    MIDDLE,
    NUMBERS_PER_WORD,
    awq_numbers,
    awq_unpacked,
    gptq_numbers,
    gptq_zeros,
    transposed_scales,
)
from plans.checkpoint.units import Checkpoint, StoredTensor, require_full
from plans.config.config import parse_config
from plans.errors import InputError, printable
from plans.packed.config import WHERE, quantization_config
from plans.packed.scheme import PACKED, SCALE, SHAPE, Scheme, is_linear
from plans.reading.files import open_regular, read_exactly

METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
SETTINGS_NAME = "quantize_config.json"
_CHUNK_BYTES = 4 << 20
"""Columns are read row by row: the more of them at once, the fewer reads."""
_SCALE_TYPES = ("F16", "BF16")


def open_transposed_origin(checkpoint: Checkpoint) -> Origin:
    """Return what a checkpoint of GPTQ or AWQ becomes; zeros and orders of inputs are read and must be trivial.

    Raises:
        InputError: numbers that are not symmetric, an order of inputs, or a format that is not understood.
    """
    directory = require_full(checkpoint)
    settings = _settings(checkpoint)
    modules = _modules(checkpoint)
    made: list[Made] = []
    schemes: dict[str, Scheme] = {}
    for module, parts in modules.items():
        schemes[module] = _check(module, parts, settings, directory)
        made += _made(module, parts, schemes[module], settings)
    repacked = {f"{module}.{part}" for module, parts in modules.items() for part in parts}
    kept = {name: stored for name, stored in checkpoint.tensors.items() if name not in repacked}
    plain = [name.removesuffix(".weight") for name in kept if is_linear(name.removesuffix(".weight"))]
    raw = {key: value for key, value in checkpoint.config.raw.items() if key != "quantization_config"}
    raw["quantization_config"] = quantization_config(schemes, ignore=["lm_head", *plain])
    tensors = MadeTensors.of(made)
    config = parse_config(raw, where=checkpoint.path, sha256=checkpoint.config.sha256)
    becoming = replace(checkpoint, config=config, tensors=kept | tensors.stored())
    return Origin(becoming, directory, tensors, stored=checkpoint, left_out=frozenset({SETTINGS_NAME}))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What `quantization_config` says."""

    is_awq: bool
    group_size: int | None
    is_less_one: bool
    """Whether zeros are stored less one."""


def _settings(checkpoint: Checkpoint) -> _Settings:
    table: Mapping[str, Any] = checkpoint.config.raw["quantization_config"]
    is_awq = table.get("quant_method") == "awq"
    layout = table.get("version", table.get("format", "gemm")) if is_awq else table.get("checkpoint_format", "gptq")
    known = ("gemm",) if is_awq else ("gptq", "gptq_v2")
    if str(layout).lower() not in known:
        raise refused("version" if is_awq else "checkpoint_format", layout, " or ".join(known))
    if table.get("bits") != 4 and table.get("w_bit") != 4:
        raise refused("bits", table.get("bits"), "4")
    size = table.get("group_size", table.get("q_group_size", 128))
    if type(size) is not int or not (size == -1 or (size > 0 and size % 32 == 0)):
        raise refused("group_size", size, "a multiple of 32, or -1 for one scale per output")
    return _Settings(is_awq, None if size == -1 else size, is_less_one=layout == "gptq")


def _split(name: str) -> tuple[str, str]:
    module, _, part = name.rpartition(".")
    return module, part


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in checkpoint.tensors.items():
        module, part = _split(name)
        if f"{module}.qweight" in checkpoint.tensors and part in PARTS:
            modules.setdefault(module, {})[part] = stored
    if not modules:
        raise InputError("holds no qweight, and says it is quantised", where=checkpoint.path, code="E-QUANT")
    return modules


def _sides(module: str, parts: Mapping[str, StoredTensor], settings: _Settings) -> tuple[int, int]:
    """Return outputs and inputs of a module whose tensors fit together."""
    rows, columns = _matrix(module, parts, "qweight", "I32")
    factors = (NUMBERS_PER_WORD, 1) if settings.is_awq else (1, NUMBERS_PER_WORD)
    out, inputs = columns * factors[0], rows * factors[1]
    size = settings.group_size or inputs
    for part, dtypes, shape in (
        ("scales", _SCALE_TYPES, (inputs // size, out)),
        ("qzeros", ("I32",), (inputs // size, out // NUMBERS_PER_WORD)),
    ):
        found = _matrix(module, parts, part, *dtypes)
        if found != shape or inputs % size:
            raise InputError(
                f"{module}.{part} has shape {list(found)}; {out} outputs of {inputs} inputs in groups of {size} need "
                f"{list(shape)}",
                where=WHERE,
                code="E-QUANT",
            )
    return out, inputs


def _matrix(module: str, parts: Mapping[str, StoredTensor], part: str, *dtypes: str) -> tuple[int, int]:
    stored = parts.get(part)
    if stored is None or stored.entry.dtype not in dtypes or len(stored.entry.shape) != 2:
        what = "is missing" if stored is None else f"is {stored.entry.dtype} of shape {list(stored.entry.shape)}"
        raise InputError(
            f"{module}.{part} {what}", where=WHERE, expected=f"a matrix of {' or '.join(dtypes)}", code="E-QUANT"
        )
    return stored.entry.shape[0], stored.entry.shape[1]


def _check(module: str, parts: Mapping[str, StoredTensor], settings: _Settings, directory: Path) -> Scheme:
    out, inputs = _sides(module, parts, settings)
    scheme = Scheme(4, settings.group_size)
    if not scheme.can_pack(out, inputs):
        raise InputError(f"{module} of {out} x {inputs} cannot be packed", where=WHERE, code="E-QUANT")
    words = np.frombuffer(_bytes(parts["qzeros"], directory), "<u4").reshape(parts["qzeros"].entry.shape)
    zeros = awq_unpacked(words) if settings.is_awq else gptq_zeros(words, is_less_one=settings.is_less_one)
    if (zeros != MIDDLE).any():
        odd = int(zeros[zeros != MIDDLE][0])
        raise InputError(
            f"{module}.qzeros holds {odd}: the numbers are not symmetric around {MIDDLE}, and packed weights have no "
            "zero points",
            where=parts["qzeros"].file,
            hint=OTHER_WAYS,
            code="E-QUANT",
        )
    if "g_idx" in parts:
        _check_order(module, parts["g_idx"], inputs=inputs, size=settings.group_size or inputs, directory=directory)
    return scheme


def _check_order(module: str, stored: StoredTensor, *, inputs: int, size: int, directory: Path) -> None:
    order = np.frombuffer(_bytes(stored, directory), "<i4") if stored.entry.dtype == "I32" else np.empty(0, np.int32)
    if not np.array_equal(order, np.arange(inputs) // size):
        raise InputError(
            f"{module}.g_idx puts inputs into groups in another order (act-order), and packed weights have none",
            where=stored.file,
            hint=OTHER_WAYS,
            code="E-QUANT",
        )


OTHER_WAYS = (
    "--as-stored copies the weights as they are, for an engine that runs them ('llamaplan emit PLAN --for vllm'); or "
    "start from the bf16 original"
)


def _bytes(stored: StoredTensor, directory: Path) -> bytes:
    path = directory / stored.file
    with open_regular(path) as fd:
        return read_exactly(fd, size=stored.entry.size_bytes, offset=stored.entry.begin, where=path)


def _made(module: str, parts: Mapping[str, StoredTensor], scheme: Scheme, settings: _Settings) -> list[Made]:
    out, inputs = _sides(module, parts, settings)
    weight, scale = parts["qweight"], parts["scales"]
    numbers = awq_numbers(weight) if settings.is_awq else gptq_numbers(weight)
    sides = Constant(np.array([out, inputs], "<i8").tobytes())
    kind, file, unit = scale.entry.dtype, weight.file, NUMBERS_PER_WORD
    return [
        Made(f"{module}.{PACKED}", "I32", scheme.packed_shape(out, inputs), numbers, file, unit, _CHUNK_BYTES),
        Made(
            f"{module}.{SCALE}", kind, scheme.scale_shape(out, inputs), transposed_scales(scale), file, 1, _CHUNK_BYTES
        ),
        Made(f"{module}.{SHAPE}", "I64", (2,), sides, file),
    ]


def refused(key: str, value: object, expected: str) -> InputError:
    """Return the error for a setting that is not understood."""
    return InputError(
        f"quantised weights with {key} {printable(value, limit=60)} are not repacked",
        where=f"{WHERE}/{key}",
        expected=expected,
        hint=OTHER_WAYS,
        code="E-QUANT",
    )
