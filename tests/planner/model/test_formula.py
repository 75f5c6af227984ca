"""The formula against checkpoints that transformers really saved, and against published parameter counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from planner.model.formula import layer_shapes
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from plans.config.config import SUPPORTED_FAMILIES
from plans.errors import InputError
from tests.planner.cases import bare

PUBLISHED = json.loads((Path(__file__).parent / "published_models.json").read_text())["models"]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {"phi3", "olmo2", "smollm3", "granite", "qwen2"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in SUPPORTED_FAMILIES),
    *((family, {"head_dim": 16}) for family in SUPPORTED_FAMILIES if family not in NO_HEAD_DIM),
    *((family, {"tie_word_embeddings": True}) for family in ("llama", "qwen2", "phi3", "mixtral")),
    *((family, {"tie_word_embeddings": False}) for family in ("gemma2", "smollm3")),
    *(
        (family, {"attention_bias": True})
        for family in ("llama", "qwen3", "gemma", "gemma2", "granite", "olmo2", "smollm3")
    ),
    *((family, {"mlp_bias": True}) for family in ("llama", "granite", "smollm3")),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None}),
    ("gemma2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"num_key_value_heads": 4}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
]


def save_tiny(folder: Path, family: str, changes: dict[str, Any]) -> Any:
    """Build a tiny model of `family`, save it the ordinary way, and return its live configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.config


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_the_formula_gives_the_tensors_transformers_saves(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    live = save_tiny(tmp_path, family, changes)
    saved = build_profile(open_checkpoint(tmp_path))
    planned = build_profile(open_checkpoint(tmp_path / "config.json"))
    assert saved.model.source == "headers"
    assert planned.model.source == "config"
    assert saved.differences == ()
    assert planned.units == saved.units
    assert planned.total_parameters == saved.total_parameters
    assert [unit.kv_window_tokens for unit in saved.layers] == windows_of(live)


def windows_of(config: Any) -> list[int | None]:
    """What transformers' own cache makes of the live configuration."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model["model"])
def test_published_parameter_counts_follow_from_the_configuration(model: dict[str, Any]) -> None:
    fields = {key: value for key, value in model.items() if key != "model"}
    profile = build_profile(bare(**fields), dtype="bf16")
    assert profile.total_parameters == model["total_parameters"]
    assert {layer.parameters for layer in profile.layers} == {model["parameters_per_layer"]}
    assert profile.embedding.parameters == model["embedding_parameters"]
    assert profile.layers[0].kv_bytes_per_token == model["kv_bytes_per_token_per_layer_bf16"]
    assert profile.total_weight_bytes == 2 * model["total_parameters"]


def test_a_bare_configuration_of_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match=r"mamba cannot be sized.*one of gemma, .*smollm3.*safetensors headers"):
        build_profile(bare(model_type="mamba"))


def test_phi3_fuses_its_projections() -> None:
    shapes = layer_shapes(bare(model_type="phi3").config)
    assert shapes["self_attn.qkv_proj.weight"] == (4 * 8 + 2 * 2 * 8, 32)
    assert shapes["mlp.gate_up_proj.weight"] == (2 * 48, 32)
