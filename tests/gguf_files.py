"""Small GGUF files of every family, written by the package `gguf`, which also names their tensors."""

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from planner.model import formula
from plans.config.config import parse_config

Kinds = Callable[[str, tuple[int, ...]], str]
"""Name and shape of a tensor -> its type."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"head_dim": 48, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 48, "tie_word_embeddings": True, "sliding_window": 16},
    "granite": {},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 48},
    "smollm3": {},
}
"""`model_type` -> what is particular about the file."""
_NORMS_AND_BIASES = 1


def config_for(family: str, **changes: Any) -> dict[str, Any]:
    """Return a `config.json` of a tiny model."""
    return {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "dtype": "float16",
        **FAMILIES[family],
        **changes,
    }


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """Return types as people's files have them: several, norms in F32."""
    if len(shape) == _NORMS_AND_BIASES:
        return "F32"
    return "Q8_0" if "embed" in name or "down" in name else "F16" if "gate" in name else "Q4_0"


def write_gguf(
    path: Path,
    raw: Mapping[str, Any],
    *,
    kinds: Kinds = mixed,
    leave_out: str = "",
    more: Mapping[str, tuple[int, ...]] | None = None,
    **metadata: Any,
) -> Path:
    """Write a file with zeros for weights.

    Args:
        path: the file; a name with {} becomes a split file of three parts.
        raw: the configuration.
        kinds: type of every tensor.
        leave_out: a tensor that is missing, by its name in the file.
        more: tensors in F32 that are added, by their names and shapes in the file.
        metadata: keys of the architecture that differ or are added; None removes one. `.` is written `__`.
    """
    family = str(raw["model_type"])
    architecture = "llama" if family == "mixtral" else family
    tensors = {name: value for name, value in _tensors(raw, architecture, kinds).items() if name != leave_out}
    tensors |= {name: (gguf.GGMLQuantizationType.F32, shape) for name, shape in (more or {}).items()}
    values = _metadata(raw) | {key.replace("__", "."): value for key, value in metadata.items()}
    parts = 3 if "{" in path.name else 1
    writer = gguf.GGUFWriter(
        path.with_name(path.name.format("")),
        architecture,
        split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0,
    )
    for key, value in values.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_array if isinstance(value, list) else None
        add = add or (writer.add_string if isinstance(value, str) else writer.add_uint32)
        if value is not None:
            add(f"{architecture}.{key}", value)
    writer.add_token_list([f"t{i}" for i in range(raw["vocab_size"])])
    for name, (kind, shape) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        is_f32 = kind is gguf.GGMLQuantizationType.F32
        rows = np.zeros(shape, np.float32) if is_f32 else np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(path.name.format(f"-00001-of-{parts:05}"))


def write_config(folder: Path, raw: Mapping[str, Any]) -> Path:
    """Write the same model's `config.json`."""
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder / "config.json"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change bytes, cut, repeat or replace numbers: one to four such things, most of them in the header."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(changed), 4096)) if changed else 0
        size = rng.choice([1, 4, 8, 8, 64])
        what = rng.choice([
            lambda size=size: rng.randbytes(size),
            lambda: struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(1 << 20)])),
            lambda: b"",
        ])()  # fmt: skip
        changed[place : place + rng.choice([0, size])] = what
    return bytes(changed[: rng.choice([len(changed)] * 4 + [rng.randrange(len(changed) + 1)])])


def _metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = raw.get("head_dim")
    found = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": raw["sliding_window"],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_count": raw.get("num_local_experts"),
        "expert_used_count": raw.get("num_experts_per_tok"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _tensors(
    raw: Mapping[str, Any], architecture: str, kinds: Kinds
) -> dict[str, tuple[gguf.GGMLQuantizationType, tuple[int, ...]]]:
    """Return name in the file -> type and shape, of the shapes that transformers has for this configuration."""
    config = parse_config(raw, where="test")
    layer = formula.layer_shapes(config)
    shapes = formula.embedding_shapes(config) | formula.head_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    for index in range(config.num_hidden_layers):
        for name, shape in layer.items():
            if ".experts." in name:  # the converter puts experts into one tensor
                name, shape = name.replace(".experts.0.", ".experts."), (config.num_experts, *shape)
            if not any(f".experts.{other}." in name for other in range(1, config.num_experts)):
                shapes[f"model.layers.{index}.{name}"] = shape
    table = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], config.num_hidden_layers)
    named = {table.get_name(name, try_suffixes=(".weight", ".bias")): (name, shape) for name, shape in shapes.items()}
    assert None not in named
    return {
        name: (gguf.GGMLQuantizationType[kinds(original, shape)], shape) for name, (original, shape) in named.items()
    }


_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
