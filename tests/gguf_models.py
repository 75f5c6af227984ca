"""Checkpoints as GGUF files, with weights and tokenizer: what convert_hf_to_gguf.py and llama-quantize would write."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from plans.config.config import read_config

Kinds = Callable[[str], str]
"""Name of a tensor in the file -> its type."""


def all_of(kind: str) -> Kinds:
    """Matrices of one type, norms in F32: what `llama-quantize --pure` writes."""
    return lambda name: "F32" if "norm" in name else kind


def write_model(model: Path, path: Path, *, kinds: Kinds, architecture: str = "llama", **metadata: Any) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        model: the folder, with a byte-level tokenizer or none.
        path: the file; a name with {} becomes a split file of three parts.
        kinds: type of every tensor.
        architecture: of the file.
        metadata: more keys of the architecture; `.` is written `__`.
    """
    raw = json.loads((model / "config.json").read_text())
    config = read_config(model / "config.json")
    weights = _weights(model)
    parts = 3 if "{" in path.name else 1
    limit = -(-len(weights) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path.with_name(path.name.format("")), architecture, split_max_tensors=limit)
    theta = (raw.get("rope_parameters") or raw)["rope_theta"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    if (model / "tokenizer.json").exists():
        add_tokenizer(writer, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        own = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        data = in_pairs(tensor, heads) if heads and architecture == "llama" else tensor
        kind = gguf.GGMLQuantizationType[kinds(own)]
        writer.add_tensor(own, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(path.name.format(f"-00001-of-{parts:05}"))


def in_pairs(weights: np.ndarray, heads: int) -> np.ndarray:
    """Put rows of q or k into rotary pairs, element by element: the order of Meta's own checkpoints."""
    found, head_dim = np.empty_like(weights), len(weights) // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            for half in range(2):
                found[head * head_dim + 2 * pair + half] = weights[head * head_dim + half * (head_dim // 2) + pair]
    return found


def _weights(model: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).to(torch.float32).numpy() for name in file.keys()}  # noqa: SIM118
    return found


def add_tokenizer(writer: gguf.GGUFWriter, model: Path) -> None:
    """Add the tokens of a byte-level tokenizer."""
    table = json.loads((model / "tokenizer.json").read_text())
    settings: Mapping[str, Any] = json.loads((model / "tokenizer_config.json").read_text())
    vocab: dict[str, int] = table["model"]["vocab"] | {token["content"]: token["id"] for token in table["added_tokens"]}
    special = {token["content"] for token in table["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in table["model"]["merges"]])
    writer.add_bos_token_id(vocab[settings["bos_token"]])
    writer.add_eos_token_id(vocab[settings["eos_token"]])
    writer.add_add_bos_token(True)
    template = model / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
