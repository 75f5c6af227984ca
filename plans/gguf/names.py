"""What a tensor of a GGUF file is called in Hugging Face's model, architecture by architecture.

Source: the tensor tables of llama.cpp (`gguf-py/gguf/constants.py`, `tensor_mapping.py`), read backwards. A tensor that
an architecture is not known to have is refused: what it costs, or what it means for the others, would be a guess.
"""

import re
from collections.abc import Mapping

from plans.errors import InputError, printable

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tables of rotary positions, the first with Llama 3.1's rope scaling in it; they keep their names."""

_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PLAIN = _NORMS | _ATTENTION | _MLP
_OLMO2_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA2_NORMS = _OLMO2_NORMS | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

LAYER_NAMES: Mapping[str, Mapping[str, str]] = {
    "gemma": _PLAIN,
    "gemma2": _GEMMA2_NORMS | _ATTENTION | _MLP,
    "granite": _PLAIN,
    "llama": _PLAIN,
    "olmo2": _OLMO2_NORMS | _ATTENTION | _QK_NORMS | _MLP,
    "phi3": _NORMS | _FUSED,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN | _QK_NORMS,
    "smollm3": _PLAIN,
}
"""`general.architecture` -> name in a block -> name in a decoder layer, both without `.weight` or `.bias`."""

_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_ROUTER = "block_sparse_moe.gate"
_SCALES = ("scale", "input_scale")
"""Of NVFP4: one number for all weights of a tensor or of an expert, and one for what is multiplied with them."""
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)(?:\.([0-9]{1,4}))?\.(weight|bias|scale|input_scale)")
_EXPERTS_TOGETHER = "_exps"


def require_known(architecture: object, *, where: object) -> str:
    """Return `general.architecture` where its tensors are known.

    Raises:
        InputError: another one, by name, or none.
    """
    if not isinstance(architecture, str) or architecture not in LAYER_NAMES:
        named = "names no architecture" if architecture is None else f"is of architecture {printable(architecture)}"
        raise InputError(
            f"{named}, whose tensors are not known here",
            where=where,
            expected="general.architecture " + ", ".join(LAYER_NAMES),
            hint="the model's safetensors checkpoint may be understood: give its folder, or its config.json",
            code="E-FAMILY",
        )
    return architecture


def is_scale(name: str) -> bool:
    """Return whether a tensor, by either name, scales others and holds no weights of its own."""
    return name.rpartition(".")[2] in _SCALES


def model_name(name: str, *, architecture: str, num_experts: int, where: object) -> str:
    """Return the Hugging Face name of a tensor; that of experts stored together holds `{}` for the expert's number.

    Raises:
        InputError: the architecture is not known to have such a tensor.

    Example:
        >>> model_name("blk.3.attn_q.weight", architecture="llama", num_experts=0, where="example")
        'model.layers.3.self_attn.q_proj.weight'
        >>> model_name("blk.0.ffn_up_exps.weight", architecture="llama", num_experts=8, where="example")
        'model.layers.0.block_sparse_moe.experts.{}.w3.weight'
    """
    stem, _, kind = name.rpartition(".")
    if name in _ROTARY:
        return name
    if stem in _ENDS and kind in ("weight", *_SCALES):
        return f"{_ENDS[stem]}.{kind}"
    match = _BLOCK.fullmatch(name)
    local = _local_name(match, LAYER_NAMES[architecture], num_experts) if match else None
    if match is None or local is None:
        raise InputError(
            f"tensor '{printable(name, limit=80)}' is not known of architecture {architecture}"
            + (f" with {num_experts} experts" if num_experts else ""),
            where=where,
            hint="this file cannot be sized here",
            code="E-TENSOR",
        )
    return f"model.layers.{match[1]}.{local}.{match[4]}"


def _local_name(match: re.Match[str], names: Mapping[str, str], num_experts: int) -> str | None:
    part, number = match[2], match[3]
    if num_experts and part == "ffn_gate_inp" and number is None:
        return _ROUTER
    expert = _EXPERTS.get(part.removesuffix(_EXPERTS_TOGETHER))
    if num_experts and expert and part.endswith(_EXPERTS_TOGETHER) != (number is not None):
        return f"block_sparse_moe.experts.{'{}' if number is None else int(number)}.{expert}"
    is_dense = number is None and not (num_experts and part in _MLP)
    return names.get(part) if is_dense else None
