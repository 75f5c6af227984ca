"""What transformers assumes where `config.json` says nothing, for families outside the allow-list.

Source: the configuration classes of transformers 5.23 (`configuration_*.py`); tests compare every row with its class.
A class default counts for a key that is absent, not for one that is null.
"""

from collections.abc import Mapping
from typing import Any, Literal

_TIED = (
    "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere "
    "cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text ernie ernie4_5 ernie4_5_moe falcon falcon_mamba "
    "gemma3_text gemma3n_text gpt2 gpt_bigcode gpt_neo gpt_neox_japanese gpt-sw3 granite_swa jetmoe lfm2 lfm2_moe lfm3 "
    "mamba marian mbart megatron-bert minicpm3 modernbert-decoder mpt mvp openai-gpt opt pegasus plbart prophetnet "
    "recurrent_gemma roberta roberta-prelayernorm roc_bert roformer starcoder2 trocr vaultgemma whisper xglm xlm "
    "xlm-roberta xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya"
)
TIED_BY_DEFAULT = frozenset(_TIED.split())
"""`model_type` of the causal models whose class ties head and embedding unless told otherwise."""

WindowRule = Literal["every", "alternate", "all", "first_of_four", "from_max_window_layers", "rope_layers"]
"""Which layers forget where `layer_types` is absent: all but every N-th; the even ones; all; all but the first of four;
those from `max_window_layers` on; those with rotary positions (in chunks)."""

WINDOW_RULES: Mapping[str, WindowRule] = {
    "afmoe": "every",
    "cohere2": "every",
    "cwm": "first_of_four",
    "dots1": "from_max_window_layers",
    "exaone4": "every",
    "gemma3_text": "every",
    "gpt_oss": "alternate",
    "llama4_text": "rope_layers",
    "ministral": "all",
    "olmo3": "every",
    "phimoe": "all",
    "qwen3_moe": "all",
    "starcoder2": "all",
    "vaultgemma": "alternate",
}

_MAMBA_2 = {
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_GATED_DELTA = {
    "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"sliding_window": 1024, "global_attn_every_n_layers": 4, "num_experts": 64, "num_experts_per_tok": 6},
    "bamba": _MAMBA_2 | {"num_key_value_heads": 8},
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4, "head_dim": 128},
    "cwm": {"sliding_window": 8192},
    "deepseek_v2": _LATENT | {"n_routed_experts": 64},
    "deepseek_v3": _LATENT | {"n_routed_experts": 256, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1},
    "dots1": {"sliding_window": 4096, "max_window_layers": 62},
    "ernie4_5_moe": {"moe_num_experts": 64, "moe_k": 6, "num_key_value_heads": 4},
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "falcon_h1": _MAMBA_2 | {"mamba_d_ssm": 1024, "num_key_value_heads": 8},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "glm": {"num_key_value_heads": 2, "head_dim": 128},
    "glm4": {"num_key_value_heads": 2, "head_dim": 128},
    "glm4_moe": {"n_routed_experts": 128, "num_experts_per_tok": 8, "num_nextn_predict_layers": 1},
    "gpt_oss": {"sliding_window": 128, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4},
    "granitemoehybrid": _MAMBA_2 | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "jamba": {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
    },
    "lfm2": {"conv_L_cache": 3, "num_key_value_heads": 8},
    "lfm2_moe": {"conv_L_cache": 3, "num_key_value_heads": 8, "num_experts": 32, "num_experts_per_tok": 4},
    "llama4_text": {
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
    },
    "minicpm3": {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    "minimax_m2": {
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "ministral": {"sliding_window": 4096},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
    "phimoe": {"num_local_experts": 16, "num_experts_per_tok": 2, "num_key_value_heads": 8},
    "qwen2_moe": {"use_sliding_window": False, "num_experts": 60, "num_experts_per_tok": 4},
    "qwen3_5_moe_text": _GATED_DELTA | {"num_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 2},
    "qwen3_5_text": _GATED_DELTA | {"num_key_value_heads": 4},
    "qwen3_moe": {"use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8},
    "qwen3_next": _GATED_DELTA | {"num_experts": 512, "num_experts_per_tok": 10, "num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "vaultgemma": {"sliding_window": 4096, "head_dim": 256, "num_key_value_heads": 4},
}
"""Values of keys that sizes depend on."""

CLASS_CONTEXTS: Mapping[str, int] = {
    "afmoe": 16384,
    "bamba": 262144,
    "cohere2": 8192,
    "cwm": 131072,
    "deepseek_v2": 2048,
    "deepseek_v3": 4096,
    "dots1": 2048,
    "ernie4_5_moe": 131072,
    "exaone4": 2048,
    "falcon_h1": 8192,
    "gemma3_text": 131072,
    "glm": 131072,
    "glm4": 131072,
    "glm4_moe": 131072,
    "gpt_oss": 131072,
    "granitemoe": 2048,
    "granitemoehybrid": 2048,
    "jamba": 262144,
    "lfm2": 128000,
    "lfm2_moe": 128000,
    "llama4_text": 131072,
    "minicpm3": 32768,
    "minimax_m2": 196608,
    "ministral": 131072,
    "olmo3": 2048,
    "olmoe": 4096,
    "phimoe": 131072,
    "qwen2_moe": 32768,
    "qwen3_5_moe_text": 32768,
    "qwen3_5_text": 32768,
    "qwen3_moe": 32768,
    "qwen3_next": 32768,
    "starcoder2": 4096,
    "vaultgemma": 8192,
}
"""`max_position_embeddings` where it is not stated."""


def class_defaults(model_type: object) -> Mapping[str, Any]:
    """Return what the class of a family outside the allow-list assumes; nothing is known of a family not listed."""
    if not isinstance(model_type, str):
        return {}
    tied = {"tie_word_embeddings": True} if model_type in TIED_BY_DEFAULT else {}
    return tied | dict(CLASS_DEFAULTS.get(model_type, {}))
