"""What a layer keeps of a whole sequence, however long it is: recurrent layers beside attention, in hybrid models.

A layer of Mamba, of gated linear attention or with a short convolution keeps the last inputs of its convolution and,
but for the last, a recurrent state. Sizes are those of the caches of transformers 5.23: inputs in the dtype that is
computed in, states in fp32 (other engines: `docs/planning.md`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plans.config.fields import Fields, as_stated

FULL, LINEAR, BOTH = "full_attention", "linear_attention", "hybrid"
FP32_BYTES = 4
_TODAY = {"attention": FULL, "mamba": LINEAR, "conv": LINEAR}
"""Older words for the kinds of layers."""


@dataclass(frozen=True, slots=True)
class State:
    """What one layer keeps of one sequence, in element counts."""

    inputs: int
    """The last inputs of its convolution."""
    recurrent: int
    """The recurrent state; 0 for a convolution alone."""
    row_width: int
    """Numbers per token between the projections."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Tensors of the layer that prove these numbers."""
    key: str
    """The key of `config.json` to name."""

    def size_bytes(self, *, width: int) -> int:
        """Return the bytes per sequence; `width` is that of a number of the dtype that is computed in."""
        return self.inputs * width + self.recurrent * FP32_BYTES


def is_hybrid(fields: Fields) -> bool:
    """Return whether recurrent layers of this family are understood."""
    return fields.raw.get("model_type") in _STATES


def read_state(fields: Fields) -> State:
    """Return what every recurrent layer of a hybrid family keeps.

    Raises:
        InputError: a size that is missing, or contradicts another.
    """
    return _STATES[fields.text("model_type")](fields)


def hybrid_kinds(fields: Fields, layers: int) -> Any:
    """Return the kind of every layer in today's words, as the family's class reads them; lists are not checked."""
    family, raw = fields.raw["model_type"], fields.raw
    if family == "falcon_h1":
        return [BOTH] * layers
    if family == "bamba":
        return _at(fields, "attn_layer_indices", layers)
    if family == "jamba":
        period, offset = fields.count("attn_layer_period"), fields.whole("attn_layer_offset")
        return [FULL if i % period == offset else LINEAR for i in range(layers)]
    stated = raw.get("layer_types") or raw.get("layers_block_type")
    if stated is not None:
        return [_TODAY.get(kind, kind) for kind in stated] if isinstance(stated, list) else stated
    if family == "granitemoehybrid":
        return [LINEAR] * layers
    if family == "lfm2":
        return _at(fields, "full_attn_idxs", layers) if raw.get("full_attn_idxs") is not None else [FULL] * layers
    every = fields.count("full_attention_interval", default=4)
    return [LINEAR if (i + 1) % every else FULL for i in range(layers)]


def _at(fields: Fields, key: str, layers: int) -> list[str]:
    """Attention where a list of layers says so."""
    found = fields.raw.get(key) or []
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise fields.error(key, f"is {as_stated(found)}", expected="a list of layers")
    return [FULL if index in found else LINEAR for index in range(layers)]


def _mamba_2(fields: Fields) -> State:
    """Mamba-2 (arXiv:2405.21060): one state of mamba_d_state per channel; inputs of x, B and C are convolved."""
    heads, states = fields.count("mamba_n_heads"), fields.count("mamba_d_state")
    inner = fields.whole("mamba_d_ssm") or fields.count("mamba_expand") * fields.count("hidden_size")
    width = fields.raw.get("mamba_d_head")
    if inner % heads or (width not in (None, "auto") and width != inner // heads):
        heads_say = f"{heads} heads of {'equal' if width in (None, 'auto') else as_stated(width)} width"
        raise fields.error("mamba_n_heads", f"{heads_say} do not make the {inner} channels of a mamba layer")
    convolved = inner + 2 * fields.count("mamba_n_groups") * states
    kernel = fields.count("mamba_d_conv")
    return State(
        inputs=convolved * kernel,
        recurrent=inner * states,
        row_width=inner + convolved + heads,
        shapes=(("mamba.conv1d.weight", (convolved, 1, kernel)), ("mamba.A_log", (heads,))),
        key="mamba_d_state",
    )


def _mamba_1(fields: Fields) -> State:
    """Mamba (arXiv:2312.00752): the inputs of x alone are convolved."""
    inner, states = fields.count("mamba_expand") * fields.count("hidden_size"), fields.count("mamba_d_state")
    kernel = fields.count("mamba_d_conv")
    return State(
        inputs=inner * kernel,
        recurrent=inner * states,
        row_width=2 * inner,
        shapes=(("mamba.conv1d.weight", (inner, 1, kernel)), ("mamba.A_log", (inner, states))),
        key="mamba_d_state",
    )


def _gated_delta(fields: Fields) -> State:
    """Gated DeltaNet (arXiv:2412.06464): one matrix of key width x value width per value head."""
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    keys = fields.count("linear_num_key_heads") * key_dim
    heads, kernel = fields.count("linear_num_value_heads"), fields.count("linear_conv_kernel_dim")
    convolved = 2 * keys + heads * value_dim
    return State(
        inputs=convolved * kernel,
        recurrent=heads * key_dim * value_dim,
        row_width=convolved + heads * value_dim,
        shapes=(
            ("linear_attn.conv1d.weight", (convolved, 1, kernel)),
            ("linear_attn.A_log", (heads,)),
            ("linear_attn.norm.weight", (value_dim,)),
        ),
        key="linear_key_head_dim",
    )


def _convolution(fields: Fields) -> State:
    """LFM2: a gated short convolution and no state."""
    hidden, kernel = fields.count("hidden_size"), fields.count("conv_L_cache")
    shapes = (("conv.conv.weight", (hidden, 1, kernel)),)
    return State(inputs=hidden * kernel, recurrent=0, row_width=3 * hidden, shapes=shapes, key="conv_L_cache")


_STATES: Mapping[object, Callable[[Fields], State]] = {
    "bamba": _mamba_2,
    "falcon_h1": _mamba_2,
    "granitemoehybrid": _mamba_2,
    "jamba": _mamba_1,
    "lfm2": _convolution,
    "lfm2_moe": _convolution,
    "qwen3_5_moe_text": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_next": _gated_delta,
}
