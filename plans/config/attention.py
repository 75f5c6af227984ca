"""What every layer keeps of a token, and of how many tokens: the part of `config.json` that the KV cache follows from.

Allow-listed families keep keys and values of every KV head. For the others this reads latent attention, windows in
their spellings, chunks, layers without attention (`block_configs`) and recurrent ones; the rest is refused by its key.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from plans.config.families import WINDOW_RULES
from plans.config.fields import Fields, as_stated
from plans.config.keys import unknown_keys
from plans.config.states import BOTH, FULL, LINEAR, State, hybrid_kinds, is_hybrid, read_state
from plans.errors import InputError, printable

KEY_AND_VALUE = 2
SLIDING, CHUNKED = "sliding_attention", "chunked_attention"
Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a number comes from that does not follow from the usual keys."""

    number: str
    key: str
    how: str


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention, in element counts."""

    kv_width: int
    """Numbers kept per token: keys and values of all KV heads, or the latent; 0 for a layer without attention."""
    score_width: int
    """Multiplications per (query, key) pair over all heads: query with key, and probability with value."""
    window: int | None
    """How many past tokens are kept, None for all."""
    latent_rope: int | None = None
    """The part of the latent that carries positions; None where keys and values are kept."""
    state: State | None = None
    """What it keeps of a sequence of any length."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of heads, and their width."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Numbers kept per token where keys and values are kept."""
        return KEY_AND_VALUE * self.kv_heads * self.head_dim

    @property
    def score_width(self) -> int:
        """Multiplications per (query, key) pair."""
        return KEY_AND_VALUE * self.heads * self.head_dim


def is_latent(raw: Mapping[str, Any]) -> bool:
    """Return whether keys and values are compressed into one vector (multi-head latent attention)."""
    return raw.get("kv_lora_rank") is not None


def query_head_dim(fields: Fields) -> int:
    """Return the width of a query and of a key under latent attention: a part without and one with positions."""
    return fields.count("qk_nope_head_dim") + fields.count("qk_rope_head_dim")


def plain_layers(heads: Heads, windows: Windows) -> tuple[LayerAttention, ...]:
    """Return layers that keep keys and values of every KV head."""
    return tuple(LayerAttention(heads.kv_width, heads.score_width, window) for window in windows)


def read_layers(fields: Fields, heads: Heads, layers: int) -> tuple[tuple[LayerAttention, ...], tuple[Origin, ...]]:
    """Return the layers of a family outside the allow-list, and where their numbers come from.

    Raises:
        InputError: a key that changes what is kept and is not understood, or one that is missing.
    """
    _refuse_unknown(fields)
    if is_hybrid(fields):
        return _hybrid_layers(fields, heads, layers)
    windows, forgets = read_windows(fields, layers)
    if fields.raw.get("block_configs") is not None:
        return _block_layers(fields, heads, windows), (*_BLOCK_ORIGINS, *forgets)
    if is_latent(fields.raw):
        layer, origin = _latent(fields, heads)
        return tuple(replace(layer, window=window) for window in windows), (origin, *forgets)
    return plain_layers(heads, windows), (_kv_origin(heads), *forgets)


def _kv_origin(heads: Heads) -> Origin:
    how = f"key and value of {heads.kv_heads} heads x {heads.head_dim}"
    return Origin("kv_bytes_per_token", "num_key_value_heads", how)


def _hybrid_layers(fields: Fields, heads: Heads, layers: int) -> tuple[tuple[LayerAttention, ...], tuple[Origin, ...]]:
    """Layers of attention, recurrent ones, and layers of both."""
    if fields.raw.get("sliding_window"):
        raise fields.error("sliding_window", "is set, and no layer of this family is known to have a window")
    kinds = hybrid_kinds(fields, layers)
    check_layer_types(fields, kinds, layers, allowed=(FULL, LINEAR, BOTH))
    if kinds == [FULL] * layers:
        return plain_layers(heads, (None,) * layers), (_kv_origin(heads),)
    state, (attention,) = read_state(fields), plain_layers(heads, (None,))
    kept = {FULL: attention, LINEAR: LayerAttention(0, 0, None, state=state), BOTH: replace(attention, state=state)}
    how = (
        f"{layers - kinds.count(FULL)} layers keep the last {state.inputs} inputs of a convolution, in the dtype "
        f"computed in, and {state.recurrent or 'no'} numbers of a state in fp32, per sequence of any length"
    )
    origins = _kv_origin(heads), Origin("state_bytes_per_sequence", state.key, how)
    return tuple(kept[kind] for kind in kinds), origins


def _refuse_unknown(fields: Fields) -> None:
    kinds = fields.raw.get("attn_type_list")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == 1 for kind in kinds)):
        found = f"is {as_stated(kinds)}"
        raise fields.error("attn_type_list", found, expected="1 (full attention) for every layer")
    for key in unknown_keys(fields.raw):
        raise InputError(
            f"is {as_stated(fields.raw[key])}, and what it changes in the cache of "
            f"model_type {printable(fields.raw.get('model_type'), limit=40)} is not understood",
            where=f"{fields.where}:/{printable(key, limit=60)}",
            hint="this model cannot be sized here",
            code="E-CONFIG",
        )


def _latent(fields: Fields, heads: Heads) -> tuple[LayerAttention, Origin]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1.3): one vector for all heads.

    vLLM, SGLang, llama.cpp and transformers (5.x) keep this vector and the shared rotary part of the key.
    """
    rank, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    is_plain_head = fields.raw.get("model_type") == "minicpm3"  # its values are as wide as a head without a latent
    usual = fields.count("hidden_size") // heads.heads if is_plain_head else heads.head_dim - rope
    value = fields.count("v_head_dim", default=usual)
    pairs = heads.heads * (heads.head_dim + value)
    how = (
        f"the compressed latent: kv_lora_rank {rank} + qk_rope_head_dim {rope} numbers per token and layer, not the "
        f"{pairs} that an engine keeps which expands it"
    )
    return LayerAttention(rank + rope, pairs, None, latent_rope=rope), Origin("kv_bytes_per_token", "kv_lora_rank", how)


# --- windows ------------------------------------------------------------------------------------------------------


def read_windows(fields: Fields, layers: int) -> tuple[Windows, tuple[Origin, ...]]:
    """Return how many tokens each layer keeps (None for all), and which key says so."""
    window, chunk = _positive(fields, "sliding_window"), _positive(fields, "attention_chunk_size")
    if fields.flag("use_sliding_window", default=True) is False:
        window = None
    kinds, key = fields.raw.get("layer_types"), "layer_types"
    if kinds is None:
        kinds, key = _kinds_by_rule(fields, layers, window=window, chunk=chunk)
    check_layer_types(fields, kinds, layers, allowed=(FULL, SLIDING, CHUNKED))
    sizes = {FULL: None, SLIDING: window, CHUNKED: chunk}
    for kind, name in ((SLIDING, "sliding_window"), (CHUNKED, "attention_chunk_size")):
        if kind in kinds and sizes[kind] is None and fields.raw.get("use_sliding_window") is not False:
            raise fields.error(name, f"is missing, and layers are of the kind {kind}", expected="an integer above 0")
    windows = tuple(sizes[kind] for kind in kinds)
    if not any(windows):
        return windows, ()
    num = sum(size is None for size in windows)
    how = f"{layers - num} layers keep their last {window or chunk} tokens, {num} keep all"
    return windows, (Origin("kv_window_tokens", key, how),)


def check_layer_types(fields: Fields, kinds: object, layers: int, *, allowed: tuple[str, ...]) -> None:
    """Refuse a list of another length, and the first kind of layer whose cache is not understood."""
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error("layer_types", f"does not list {layers} layers")
    for index, kind in enumerate(kinds):
        if kind not in allowed:
            raise fields.error(
                f"layer_types/{index}",
                f"is {printable(kind, limit=40)}, and what such a layer keeps is not understood",
                expected=" or ".join(allowed),
            )


def _positive(fields: Fields, name: str) -> int | None:
    value = fields.raw.get(name)
    if value is None or (value == 0 and fields.raw.get("use_sliding_window") is False):
        return None
    if type(value) is not int or value < 1:
        raise fields.error(name, f"is {as_stated(value)}", expected="an integer above 0")
    return value


def _kinds_by_rule(fields: Fields, layers: int, *, window: int | None, chunk: int | None) -> tuple[list[str], str]:
    """The kinds that follow from other keys, or from the family's class, and the key to name."""
    rule = WINDOW_RULES.get(str(fields.raw.get("model_type")))
    every = next((k for k in _EVERY if fields.raw.get(k) is not None), None)
    if rule == "rope_layers" and chunk is not None:
        # Llama 4: layers with rotary positions attend in chunks, those without to everything
        return [CHUNKED if rotary else FULL for rotary in rope_layers(fields, layers)], "no_rope_layers"
    if chunk is not None and chunk < _positions(fields):
        raise fields.error("attention_chunk_size", f"is {chunk}, and no key says which layers attend in chunks")
    if window is None:
        return [FULL] * layers, "sliding_window"
    if every and rule in {None, "every"}:
        step = _positive(fields, every)
        return [FULL if (i + 1) % (step or 1) == 0 else SLIDING for i in range(layers)], every
    if rule == "from_max_window_layers":
        first = fields.raw.get("max_window_layers")
        return [SLIDING if type(first) is int and i >= first else FULL for i in range(layers)], "max_window_layers"
    if rule in _BY_INDEX:
        return [FULL if _BY_INDEX[rule](i) else SLIDING for i in range(layers)], "sliding_window"
    if window >= _positions(fields):
        return [FULL] * layers, "sliding_window"
    raise fields.error(
        "sliding_window", f"is {window}, and no key says which layers it holds for", expected="layer_types beside it"
    )


_EVERY = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
_BY_INDEX: Mapping[str | None, Callable[[int], bool]] = {
    "alternate": lambda i: i % 2 == 1,
    "first_of_four": lambda i: i % 4 == 0,
    "all": lambda _i: False,
}


def _positions(fields: Fields) -> int:
    """No context is longer: a window as long as this holds everything."""
    return fields.count("max_position_embeddings", default=1 << 31)


def rope_layers(fields: Fields, layers: int, *, every: int | None = None) -> list[bool]:
    """Return which layers have rotary positions: `no_rope_layers`, else all but every N-th.

    Args:
        fields: the configuration; its `no_rope_layers` is 1 for a layer that has them.
        layers: how many there are.
        every: N where `no_rope_layer_interval` is absent; None: then that is an error.
    """
    flags = fields.raw.get("no_rope_layers") or []
    if not flags:
        step = fields.count("no_rope_layer_interval", default=every)
        flags = [int((i + 1) % step != 0) for i in range(layers)]
    if not isinstance(flags, list) or len(flags) != layers or not all(flag in (0, 1) for flag in flags):
        raise fields.error("no_rope_layers", f"does not list {layers} layers", expected="0 or 1 for each")
    return [bool(flag) for flag in flags]


# --- block_configs ------------------------------------------------------------------------------------------------

_BLOCK_KEYS = {"n_heads_in_group", "no_op", "replace_with_linear"}
_BLOCK_ORIGINS = (
    Origin("kv_bytes_per_token", "block_configs", "per layer: key and value of num_attention_heads / n_heads_in_group"),
)


def _block_layers(fields: Fields, heads: Heads, windows: Windows) -> tuple[LayerAttention, ...]:
    """Layers as a search left them (DeciLM, Llama-Nemotron): own numbers of KV heads, or no attention at all."""
    blocks = fields.raw["block_configs"]
    if not isinstance(blocks, list) or len(blocks) != len(windows):
        raise fields.error("block_configs", f"does not list {len(windows)} layers")
    return tuple(
        _block_layer(fields, heads, block, at=f"block_configs/{index}/attention", window=windows[index])
        for index, block in enumerate(blocks)
    )


def _block_layer(fields: Fields, heads: Heads, block: Any, *, at: str, window: int | None) -> LayerAttention:
    attention = block.get("attention") if isinstance(block, dict) else None
    if not isinstance(attention, dict):
        raise fields.error(at, "is not a table")
    for key, value in attention.items():
        if value and key not in _BLOCK_KEYS:
            raise fields.error(f"{at}/{printable(key, limit=40)}", f"is {as_stated(value)}, not understood")
    if attention.get("no_op") or attention.get("replace_with_linear"):
        return LayerAttention(0, 0, window)
    group = attention.get("n_heads_in_group")
    if type(group) is not int or group < 1 or heads.heads % group:
        raise fields.error(f"{at}/n_heads_in_group", f"is {printable(group, limit=40)}; {heads.heads} heads")
    return LayerAttention(KEY_AND_VALUE * heads.heads // group * heads.head_dim, heads.score_width, window)


def block_intermediate_size(fields: Fields) -> int:
    """Return the widest feed-forward row that `block_configs` asks for, 0 without such a key.

    Source: `DeciLMConfig` of the published checkpoints: 2/3 x ffn_mult x hidden_size, up to a multiple of 256.
    """
    blocks = fields.raw.get("block_configs")
    if not isinstance(blocks, list):
        return 0
    hidden = fields.count("hidden_size")
    return max((_ffn_width(fields, block, hidden, index) for index, block in enumerate(blocks)), default=0)


def _ffn_width(fields: Fields, block: Any, hidden: int, index: int) -> int:
    ffn = block.get("ffn") if isinstance(block, dict) else None
    if not isinstance(ffn, dict):
        raise fields.error(f"block_configs/{index}/ffn", "is not a table")
    if ffn.get("no_op") or ffn.get("replace_with_linear"):
        return 0
    multiple = fields.number(ffn, "ffn_mult", f"block_configs/{index}/ffn")
    return -(-int(2 * multiple * hidden / 3) // 256) * 256
