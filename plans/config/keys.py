"""Which keys of `config.json` may change what a layer keeps, and which of those are understood.

Families outside the allow-list are sized from their headers, and headers do not say how many tokens a layer keeps,
whether layers share a cache, or that a state is kept beside it. A key whose name tells of such things and which nothing
here reads is refused by its name: a size that ignores it could be wrong.
"""

import re
from collections.abc import Mapping
from typing import Any

_TELLING = re.compile(
    r"attn|attention|window|chunk|cache|kv|lora_rank|latent|head_dim|num_heads|n_heads|query|sink|swa|"
    r"mamba|ssm|rnn|recurrent|rwkv|time_mix|retention|memory|conv|linear_|_state|state_size|d_state|"
    r"index_|indexer|sparse|layer_types|layers_type|block_|blocks|pattern|hybrid|per_layer|share_|shared_layers|cla_|"
    r"local_|global_|layer_group|compress_rat|mtp|nextn|encoder_decoder"
)
_HARMLESS = re.compile(
    r"dropout|pdrop|bias|softmax|softcap|implementation|flash|scal|multiplier|norm|init|temperature|freq|theta"
)
"""Parts of names that tell of how attention is computed, not of what is kept."""

_READ_OR_HARMLESS = (
    # read in plans.checkpoint
    "num_attention_heads head_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window "
    "sliding_window_pattern _sliding_window_pattern use_sliding_window max_window_layers layer_types "
    "attention_chunk_size no_rope_layers no_rope_layer_interval global_attn_every_n_layers block_configs "
    "num_nextn_predict_layers num_local_experts "
    # what the headers show: ranks and biases of projections, which layers have experts
    "q_lora_rank qk_head_dim clip_qkv decoder_sparse_step mlp_layer_types "
    # how it is computed, not what is kept
    "use_cache output_attentions output_hidden_states attn_output_gate use_attention_gate attn_pdrop "
    "chunk_size_feed_forward query_pre_attn_scalar"
)
_UNDERSTOOD = frozenset(_READ_OR_HARMLESS.split())
_OF_FAMILY: Mapping[str, re.Pattern[str]] = {
    # of their recurrent layers, read in plans.config.states
    "bamba": re.compile(r"mamba_\w+|attn_layer_indices|attn_rotary_emb"),
    "falcon_h1": re.compile(r"mamba_\w+"),
    "granitemoehybrid": re.compile(r"mamba_\w+|layers_block_type"),
    "jamba": re.compile(r"(use_)?mamba\w+|attn_layer_(offset|period)"),
    "lfm2": re.compile(r"conv_\w+|block_\w+|full_attn_idxs|num_heads"),
    "lfm2_moe": re.compile(r"conv_\w+"),
    "qwen3_5_moe_text": re.compile(r"linear_\w+|full_attention_interval|mamba_ssm_dtype|mtp_\w+"),
    "qwen3_5_text": re.compile(r"linear_\w+|full_attention_interval|mamba_ssm_dtype|mtp_\w+"),
    "qwen3_next": re.compile(r"linear_\w+|full_attention_interval"),
    # its class and its weights know no other attention (`attn_type_list`), and layers behind the last are left out
    "minimax_m2": re.compile(r"attn_type_list|use_mtp|mtp_transformer_layers|num_mtp_modules"),
}
"""What is understood in one family only."""
_NOTHING = re.compile(r"(?!)")


def unknown_keys(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that say something (not null, false, 0 or empty) which nothing here understands."""
    own = _OF_FAMILY.get(str(raw.get("model_type")), _NOTHING)
    return tuple(key for key, value in raw.items() if value and _is_unknown(key) and not own.fullmatch(key))


def _is_unknown(key: str) -> bool:
    return bool(_TELLING.search(key)) and key not in _UNDERSTOOD and not _HARMLESS.search(key)
