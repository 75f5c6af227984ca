"""A GGUF file, alone or split, as a checkpoint: the same tensors, by Hugging Face's names, in their own types."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from plans.checkpoint.header import SafetensorsHeader, TensorEntry
from plans.checkpoint.names import unit_of
from plans.checkpoint.units import Checkpoint, Shard, StoredTensor, unit_keys
from plans.config.config import ModelConfig, parse_config
from plans.errors import InputError, IntegrityError
from plans.gguf.config import config_of
from plans.gguf.header import GgufTensor
from plans.gguf.names import is_scale, model_name, require_known
from plans.gguf.split import GgufFile, read_gguf_files
from plans.reading.sizes import format_bytes

SUFFIX = ".gguf"
MATRIX = 2


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or the first part of a split one; no weight is read.

    Raises:
        InputError: malformed, of an architecture, a type or a tensor that is not known, or contradicting itself.
        IntegrityError: truncated, or parts that do not belong together.
        MachineError: a file cannot be read.
    """
    files = read_gguf_files(path)
    metadata = files[0].header.metadata
    architecture = require_known(metadata.get("general.architecture"), where=path)
    held = {name: tensor for file in files for name, tensor in file.header.tensors.items()}
    raw = config_of(metadata, held, architecture=architecture, where=path)
    config = parse_config(raw, where=path, sha256=files[0].header.header_sha256)
    config = replace(config, quantization=f"GGUF: {_types(held)}")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in held.items():
        if is_scale(name):
            _check_scale(name, tensor, held, path)
    for name, stored in _stored(files, config, architecture, path):
        if name in tensors:
            raise InputError(f"{tensors[name].name} and {stored.name} are both {name}", where=path, code="E-DUPLICATE")
        tensors[name] = stored
    _check_layers(config, tensors, path)
    return Checkpoint(path, None, config, tuple(map(_shard, files)), tensors, (), format="gguf")


def _types(tensors: Mapping[str, GgufTensor]) -> str:
    """Return the bytes of each type in words, the most first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type.name] += tensor.size_bytes
    return ", ".join(f"{kind} {format_bytes(size)}" for kind, size in sizes.most_common())


def _stored(
    files: tuple[GgufFile, ...], config: ModelConfig, architecture: str, path: Path
) -> Iterator[tuple[str, StoredTensor]]:
    for file in files:
        for name, tensor in file.header.tensors.items():
            found = model_name(name, architecture=architecture, num_experts=config.num_experts, where=path)
            if "{}" not in found:
                yield found, StoredTensor(file.name, _entry(tensor), name)
                continue
            for expert, entry in enumerate(_experts(name, tensor, config.num_experts, path)):
                yield found.format(expert), StoredTensor(file.name, entry, name)


def _check_scale(name: str, tensor: GgufTensor, held: Mapping[str, GgufTensor], path: Path) -> None:
    """Weights of NVFP4 alone have scales of their own: single numbers, of experts that lie together one for each."""
    weight = held.get(f"{name.rpartition('.')[0]}.weight")
    numbers = () if weight is None or weight.type.name != "NVFP4" else weight.shape[:-MATRIX] or (1,)
    if tensor.type.name != "F32" or tensor.shape != numbers:
        raise InputError(
            f"{name} is {tensor.type.name} of shape {list(tensor.shape)}, beside "
            + ("no weight" if weight is None else f"a weight in {weight.type.name} of shape {list(weight.shape)}"),
            where=path,
            expected="F32, and one number for each matrix of NVFP4",
            code="E-TENSOR",
        )


def _experts(name: str, tensor: GgufTensor, num_experts: int, path: Path) -> Iterator[TensorEntry]:
    """Experts lie one after the other in one tensor, each as a matrix of its own."""
    if tensor.shape[0] != num_experts or (len(tensor.shape) != 1 + MATRIX and not is_scale(name)):
        raise InputError(
            f"{name} has shape {list(tensor.shape)}, expert_count is {num_experts}", where=path, code="E-EXPERTS"
        )
    size = tensor.size_bytes // num_experts
    for begin in range(tensor.begin, tensor.end, size):
        yield TensorEntry(tensor.type.name, tensor.shape[1:], begin, begin + size)


def _entry(tensor: GgufTensor) -> TensorEntry:
    return TensorEntry(tensor.type.name, tensor.shape, tensor.begin, tensor.end)


def _shard(file: GgufFile) -> Shard:
    header = file.header
    entries = {name: _entry(tensor) for name, tensor in header.tensors.items()}
    return Shard(file.name, SafetensorsHeader(entries, {}, header.header_sha256, header.file_bytes))


def _check_layers(config: ModelConfig, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Every unit must hold something, and nothing may lie beyond the last layer."""
    units = unit_keys(config)
    owners = {key for name in tensors if (key := unit_of(name)) is not None}
    for key in sorted(owners - set(units)):
        raise InputError(
            f"holds block {key[1]}, block_count is {config.num_hidden_layers}", where=path, code="E-LAYERS"
        )
    for kind, index in units:
        if (kind, index) not in owners:
            missing = f"blk.{index}.*" if kind == "layer" else "token_embd" if kind == "embedding" else "output_norm"
            raise IntegrityError(
                f"no tensor {missing}.weight", where=path, hint="the file is incomplete", code="E-LAYERS"
            )
