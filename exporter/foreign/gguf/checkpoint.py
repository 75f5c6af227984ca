"""A GGUF file -> the Hugging Face checkpoint that it becomes: tensors, config, tokenizer. No weight is read yet."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporter.foreign.gguf.config import ROPE_FACTORS, Family, checkpoint_config, generation_config, require_family
from exporter.foreign.gguf.tensors import FLOATS, Becoming, Requantise, become
from exporter.foreign.gguf.tokenizer import tokenizer_files
from exporter.foreign.made import MadeTensors
from exporter.foreign.origin import Origin, Say
from plans.checkpoint.names import is_leftover, local_name, unit_of
from plans.checkpoint.units import Checkpoint, StoredTensor
from plans.config.config import parse_config
from plans.errors import InputError
from plans.gguf.header import GgufTensor
from plans.gguf.names import LAYER_NAMES, is_scale
from plans.gguf.split import GgufFile, read_gguf_files
from plans.packed.config import quantization_config
from plans.reading.files import open_regular, read_exactly
from plans.reading.sizes import format_bytes

GENERATION_NAME = "generation_config.json"
MAX_ROPE_FACTORS = 4096
_BIASES: Mapping[str, tuple[frozenset[str], ...]] = {
    "llama": (frozenset("qkvo"), frozenset()),
    "qwen2": (frozenset("qkv"),),
    "qwen3": (frozenset(),),
}
"""Which projections of attention may have biases, all of them or none."""
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


def open_gguf_origin(checkpoint: Checkpoint, *, requantise: Requantise | None) -> Origin:
    """Return what an opened GGUF file becomes.

    Args:
        checkpoint: from `plans.checkpoint.gguf.open_gguf`.
        requantise: in which form types that have no packed form are written; None refuses them.

    Raises:
        InputError: an architecture, a key or a tensor that is not understood, or types that lose something where nobody
            said how they are to be written.
    """
    file = _File.of(checkpoint)
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_leftover(name)}
    _check_names(stored, architecture=file.architecture, where=checkpoint.path)
    found = _become(file, stored, requantise)
    if found.lost:
        raise _refused(file, stored, found)
    raw = _config(file, found)
    made = MadeTensors.of(found.made)
    becoming = replace(
        checkpoint,
        directory=checkpoint.path.parent,
        config=parse_config(raw, where=checkpoint.path, sha256=checkpoint.config.sha256),
        tensors=found.kept | made.stored(),
        format="safetensors",
    )
    return Origin(
        becoming,
        checkpoint.path.parent,
        made,
        partial(_small_files, file),
        stored=checkpoint,
        is_single_file=True,
        errors=found.errors,
    )


def _small_files(file: "_File", warn: Say) -> dict[str, bytes]:
    where = file.checkpoint.path
    made = {GENERATION_NAME: _written(generation_config(file.metadata, where=where))}
    return made | tokenizer_files(file.metadata, architecture=file.architecture, where=where, warn=warn)


@dataclass(frozen=True, slots=True)
class _File:
    """The headers of a file, once more: what `Checkpoint` does not keep."""

    checkpoint: Checkpoint
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    architecture: str
    family: Family
    rope_factors: tuple[float, ...] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_File":
        files = read_gguf_files(checkpoint.path)
        metadata = files[0].header.metadata
        architecture = str(metadata.get("general.architecture"))
        family = require_family(architecture, num_experts=checkpoint.config.num_experts, where=checkpoint.path)
        tensors = {name: tensor for file in files for name, tensor in file.header.tensors.items()}
        return cls(checkpoint, metadata, tensors, architecture, family, _rope_factors(files, checkpoint.path))


def _rope_factors(files: tuple[GgufFile, ...], path: Path) -> tuple[float, ...] | None:
    for file in files:
        tensor = file.header.tensors.get(ROPE_FACTORS)
        if tensor is None:
            continue
        if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_ROPE_FACTORS:
            raise InputError(
                f"{ROPE_FACTORS} is {tensor.type.name} of shape {list(tensor.shape)}",
                where=path,
                expected="a vector of F32",
                code="E-TENSOR",
            )
        with open_regular(path.with_name(file.name)) as fd:
            data = read_exactly(fd, size=tensor.size_bytes, offset=tensor.begin, where=path)
        return struct.unpack(f"<{tensor.shape[0]}f", data)
    return None


def _become(file: _File, stored: Mapping[str, StoredTensor], requantise: Requantise | None) -> Becoming:
    config = file.checkpoint.config
    return become(stored, head_dim=config.head_dim, interleaves=file.family.interleaves, requantise=requantise)


def _config(file: _File, found: Becoming) -> dict[str, Any]:
    raw = checkpoint_config(
        file.metadata,
        file.tensors,
        architecture=file.architecture,
        dtype=FLOATS[found.dtype],
        rope_factors=file.rope_factors,
        where=file.checkpoint.path,
    )
    if found.schemes:
        raw["quantization_config"] = quantization_config(found.schemes, ignore=["lm_head", *found.plain_linears])
    return raw


def _check_names(tensors: Mapping[str, StoredTensor], *, architecture: str, where: Path) -> None:
    """Require in every layer what the class has there, no more and no less.

    Scales lie beside weights of NVFP4 alone, which are refused by their type.
    """
    layers: dict[int, set[str]] = {}
    for name in tensors:
        key = unit_of(name)
        if key is not None and key[0] == "layer" and not is_scale(name):
            layers.setdefault(key[1], set()).add(local_name(name))
    wanted = {f"{part}.weight" for part in LAYER_NAMES[architecture].values()}
    biases = {name for name in layers[0] if name.endswith(".bias")}
    _check_biases(biases, architecture=architecture, where=where)
    for index, names in sorted(layers.items()):
        odd = sorted(names ^ (wanted | biases))
        if odd:
            how = "is of no use to" if odd[0] in names else "is missing for"
            raise InputError(
                f"model.layers.{index}.{odd[0]} {how} the model it becomes, which has {len(wanted | biases)} tensors "
                "in every layer",
                where=where,
                code="E-TENSOR",
            )


def _check_biases(biases: set[str], *, architecture: str, where: Path) -> None:
    parts = {name.split(".")[1] for name in biases}
    attention = frozenset(part[0] for part in parts - _MLP)
    mlp = parts & _MLP
    is_known = attention in _BIASES[architecture] and (not mlp or (mlp == _MLP and architecture == "llama"))
    if not is_known:
        raise InputError(
            f"has biases in {', '.join(sorted(biases)) or 'no layer'}, where the class of {architecture} has others",
            where=where,
            code="E-TENSOR",
        )


def _refused(file: _File, stored: Mapping[str, StoredTensor], found: Becoming) -> InputError:
    """Return the error that names the types, and what each way out would give, in bytes."""
    kinds = ", ".join(f"{kind} ({count} tensors)" for kind, count in found.lost.most_common())
    ways = {way: _become(file, stored, way) for way in ("bf16", "int8")}
    unread = sorted(ways["bf16"].lost)
    if unread:
        return InputError(
            f"holds {kinds}; {', '.join(unread)} is not read here",
            where=file.checkpoint.path,
            hint="llama-quantize --allow-requantize FILE OTHER.gguf Q8_0 writes it in a type that is; or export the "
            "model's safetensors checkpoint",
            code="E-TYPE",
        )
    sizes = {way: format_bytes(made.size_bytes) for way, made in ways.items()}
    return InputError(
        f"holds {kinds}, which have no form without loss in a checkpoint of safetensors",
        where=file.checkpoint.path,
        hint=f"--requantise int8 writes them in 8 bits ({sizes['int8']} in all; KL to the file about 1e-3), "
        f"--requantise bf16 everything in 16 bits ({sizes['bf16']})",
        code="E-REQUANTISE",
    )


def _written(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n").encode()
