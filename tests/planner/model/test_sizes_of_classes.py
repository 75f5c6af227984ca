"""Families outside the allow-list, made by the classes of transformers: their parameters, and what a forward keeps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from exporter.emit import emit
from planner import solve_model
from planner.cli.next_steps import after_export
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.errors import InputError, UsageError
from runtime.reading.families import parse_model_config
from tests.planner.model.test_other_families import write_headers

pytestmark = pytest.mark.row("P2")
TOKENS = 5
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GRANITE = {"shared_intermediate_size": 80, "mamba_n_heads": 8, "time_step_limit": None}
ATTENTION = {"layer_types": ["attention"] * 4}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
CONVOLVED = {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 5}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2}
DELTA = MIXED | {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 96, "mamba_d_head": 12}),
    "Granite 4, experts and mamba": (
        "granitemoehybrid",
        MAMBA | MIXED | {"shared_intermediate_size": 80, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Granite 4, mamba": (
        "granitemoehybrid",
        MAMBA
        | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "Jamba": ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4, "mamba_d_state": 6}),
    "LFM2": ("lfm2", CONVOLVED),
    "LFM2, experts": ("lfm2_moe", CONVOLVED | ROUTED | {"num_dense_layers": 1}),
    "Qwen3-Next": ("qwen3_next", DELTA | ROUTED | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [3]}),
    "Qwen3.5": ("qwen3_5_text", DELTA | {"layer_types": None}),
    "Qwen3.5, experts": ("qwen3_5_moe_text", DELTA | ROUTED | {"shared_expert_intermediate_size": 40}),
    "Granite 4, dense": ("granitemoehybrid", GRANITE | ATTENTION | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "Granite 4, experts": (
        "granitemoehybrid",
        GRANITE | ATTENTION | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "MiniMax-M2": (
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "attn_type_list": [1] * 4,
            "num_mtp_modules": 3,
        },
    ),
    "cohere2": ("cohere2", {"head_dim": 16, "sliding_window": 8}),
    "glm4": ("glm4", {"head_dim": 16}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "proportional rope": ("seed_oss", {"head_dim": 16, "rope_parameters": PROPORTIONAL}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **ROUTED}),
}


def make(name: str) -> tuple[PreTrainedConfig, PreTrainedModel]:
    family, more = MODELS[name]
    config = AutoConfig.for_model(family, **SHAPE, **more)
    return config, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write(folder: Path, config: PreTrainedConfig, model: PreTrainedModel) -> Path:
    """Write what `save_pretrained` would, without data."""
    stored: Mapping[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    rows = {name: ("BF16", tuple(t.shape)) for name, t in stored.items() if name not in model.all_tied_weights_keys}
    return write_headers(folder, json.loads(config.to_json_string(use_diff=False)), rows)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_cache_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    config, model = make(name)
    profile = build_profile(open_checkpoint(write(tmp_path, config, model)))
    stored = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    assert profile.total_parameters == sum(stored.values())
    cache = model(torch.ones(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    assert [layer.kv_bytes_per_token for layer in profile.layers] == [
        kept_bytes(layer) // TOKENS for layer in cache.layers
    ]
    assert [layer.state_bytes_per_sequence for layer in profile.layers] == [
        state_bytes(layer) for layer in cache.layers
    ]
    assert [unit.kv_window_tokens for unit in profile.layers] == [
        getattr(layer, "sliding_window", None) for layer in cache.layers
    ]


def kept_bytes(layer: Any) -> int:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def state_bytes(layer: Any) -> int:
    tables = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
    return sum(tensor.nbytes for table in tables for tensor in table.values() if tensor is not None)


NOT_RUN = {
    "qwen3_moe, a dense layer": ("qwen3_moe", {"head_dim": 16, "mlp_only_layers": [1], **ROUTED}),
    "qwen3_moe, every second": ("qwen3_moe", {"head_dim": 16, "decoder_sparse_step": 2, **ROUTED}),
    "mistral, some windows": (
        "mistral",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3, a window of 1": ("qwen3", {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 2}),
}


@pytest.mark.row("P9")
@pytest.mark.parametrize("name", NOT_RUN)
def test_what_the_runtime_refuses_no_hint_and_no_script_names_it_for(name: str, tmp_path: Path) -> None:
    family, more = NOT_RUN[name]
    config = AutoConfig.for_model(family, **SHAPE, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = write(tmp_path / "model", config, model)
    with pytest.raises(InputError):
        parse_model_config(open_checkpoint(folder).config.raw)
    plan = solve_model(folder, devices=["cuda:0=1GiB"])
    assert "emit" in after_export(plan, tmp_path)
    with pytest.raises(UsageError, match="llamarun, which does not run"):
        emit(plan, engine="torchrun")


@pytest.mark.row("P9")
@pytest.mark.parametrize("name", ["Bamba", "Falcon-H1", "Jamba", "LFM2"])
def test_a_device_map_names_all_that_the_class_has(name: str, tmp_path: Path) -> None:
    config, model = make(name)
    plan = solve_model(write(tmp_path, config, model), devices=["cuda:0=1GiB"])
    placed = json.loads(emit(plan, engine="accelerate").files["device_map.json"])
    owners = tuple(f"{module}." for module in placed)
    assert [name for name, _ in model.named_parameters() if not name.startswith(owners)] == []
