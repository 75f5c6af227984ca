"""Tensor names and shapes of every unit, from the configuration alone.

This is how a model is sized before its weights are downloaded, and what the headers are checked against. Every family
is compared with a checkpoint that transformers itself saved (tests/planner/test_formula.py).
"""

from collections.abc import Mapping

from plans.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD
from plans.config.config import SUPPORTED_FAMILIES, ModelConfig
from plans.errors import InputError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

_QK_NORM_PER_HEAD = {"qwen3", "qwen3_moe"}
_QK_NORM_FULL_WIDTH = {"olmo2"}
_QKV_BIAS_ALWAYS = {"qwen2"}
_NO_ATTENTION_BIAS = {"mistral", "mixtral", "phi3"}
_MLP_BIAS_BY_CONFIG = {"llama", "granite", "smollm3"}
_NORMS: Mapping[str, tuple[str, ...]] = {
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""Of the block, and of gate, up and down of one expert, as they lie on disk; transformers fuses them only in memory."""
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")


def is_known(config: ModelConfig) -> bool:
    """Return whether the shapes of this family follow from its configuration."""
    return config.is_supported


def require_known(config: ModelConfig, *, where: object) -> None:
    """Refuse a family whose shapes cannot be derived.

    Raises:
        InputError: listing the families that can be sized from a bare configuration.
    """
    if not is_known(config):
        raise InputError(
            f"model_type {config.model_type} cannot be sized from its configuration alone",
            where=where,
            expected="one of " + ", ".join(SUPPORTED_FAMILIES),
            hint="give the checkpoint folder: its safetensors headers are enough for any family",
            code="E-FAMILY",
        )


def embedding_shapes(config: ModelConfig) -> Shapes:
    """Return the tensors of the embedding unit."""
    return {EMBEDDING: (config.vocab_size, config.hidden_size)}


def head_shapes(config: ModelConfig) -> Shapes:
    """Return the tensors of the head unit: final norm and lm_head (the embedding table again if tied)."""
    return {FINAL_NORM: (config.hidden_size,), HEAD: (config.vocab_size, config.hidden_size)}


def layer_shapes(config: ModelConfig) -> Shapes:
    """Return the tensors of one decoder layer, named without the ``model.layers.N.`` prefix.

    All layers of the supported families have the same tensors; only their attention windows differ.

    Example:
        >>> from plans.config.config import parse_config
        >>> raw = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...        "intermediate_size": 16, "vocab_size": 32}
        >>> layer_shapes(parse_config(raw, where="example"))["mlp.down_proj.weight"]
        (8, 16)
    """
    names = _NORMS.get(config.model_type, _TWO_NORMS)
    norms: Shapes = {f"{name}.weight": (config.hidden_size,) for name in names}
    inner = _experts_shapes(config) if config.model_type in _EXPERT_NAMES else _mlp_shapes(config)
    return norms | _attention_shapes(config) | inner


def stacked_experts(layer: Shapes, config: ModelConfig) -> Shapes:
    """Return `layer_shapes` with the experts in two tensors, as transformers computes with them and some files do."""
    num, hidden, inner = config.num_experts, config.hidden_size, config.expert_intermediate_size
    rest = {name.replace("block_sparse_moe", "mlp"): s for name, s in layer.items() if ".experts." not in name}
    return rest | {
        "mlp.experts.gate_up_proj": (num, 2 * inner, hidden),
        "mlp.experts.down_proj": (num, hidden, inner),
    }


def _attention_shapes(config: ModelConfig) -> Shapes:
    hidden = config.hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    if config.model_type == "phi3":
        return {"self_attn.qkv_proj.weight": (q + 2 * kv, hidden), "self_attn.o_proj.weight": (hidden, q)}
    shapes = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
    }
    return shapes | _attention_biases(config, q, kv) | _qk_norms(config, q, kv)


def _attention_biases(config: ModelConfig, q: int, kv: int) -> Shapes:
    qkv: Shapes = {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.model_type in _QKV_BIAS_ALWAYS:
        return qkv
    if config.model_type in _NO_ATTENTION_BIAS or not config.attention_bias:
        return {}
    return qkv | {"self_attn.o_proj.bias": (config.hidden_size,)}


def _qk_norms(config: ModelConfig, q: int, kv: int) -> Shapes:
    if config.model_type in _QK_NORM_PER_HEAD:
        q = kv = config.head_dim
    elif config.model_type not in _QK_NORM_FULL_WIDTH:
        return {}
    return {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}


def _mlp_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.model_type == "phi3":
        return {"mlp.gate_up_proj.weight": (2 * inner, hidden), "mlp.down_proj.weight": (hidden, inner)}
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.mlp_bias and config.model_type in _MLP_BIAS_BY_CONFIG:
        shapes |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    return shapes


def _experts_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.expert_intermediate_size
    block, gate, up, down = _EXPERT_NAMES[config.model_type]
    shapes: Shapes = {f"{block}.gate.weight": (config.num_experts, hidden)}
    for expert in range(config.num_experts):
        at = f"{block}.experts.{expert}"
        shapes |= {f"{at}.{name}.weight": (inner, hidden) for name in (gate, up)}
        shapes[f"{at}.{down}.weight"] = (hidden, inner)
    return shapes
