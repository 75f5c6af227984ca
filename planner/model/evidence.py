"""Families outside the allow-list: the headers must prove what the configuration says, or the model is refused.

Every layer shows the attention that its cache was counted for (projections of the right width) and no module that could
keep something else; experts are as many as the configuration says; no tensor of the text model belongs to no unit.
"""

import math
import re
from collections.abc import Mapping

from planner.model.experts import check_experts
from planner.model.packing import logical_shape
from plans.checkpoint.names import UnitKey, unit_of
from plans.checkpoint.scales import PACKED_NAMES
from plans.checkpoint.units import Checkpoint, unexpected_tensors
from plans.config.config import ModelConfig
from plans.config.states import State
from plans.errors import InputError, printable

Row = tuple[str, tuple[int, ...]]
Rows = Mapping[str, Row]

_ATTENTION = re.compile(r"self_attn\.(.+)")
_KNOWN_PARTS = re.compile(
    r"(q|k|v|o|qkv|g|gate|W_pack|dense|out|query_key_value|q_a|q_b|kv_a|kv_b)(_proj)?(_with_mqa)?\..*"
    r"|(q|k|v|kv_a|q_a|query|key|sub)_?(norm|layernorm|ln)(\..*)?|sinks|(inner_attn_ln|attn_sub_norm)\..*"
    r"|rotary_emb\..*|linear_attn\.weight|(q|k|v|kv)_scale"
)
_KNOWN_MODULES = re.compile(
    r"(self_attn|mlp|block_sparse_moe|feed_forward|shared_mlp|moe|ffn|shared_experts?|router|gate|experts)\..*"
    r"|\w*(norm|ln|layernorm)\w*\.(weight|bias)|layer_scalar|rotary_emb\..*"
)
_KEYS = re.compile(r".*\b(k|v|kv|qkv)_proj\..*")
"""Keys and values, which nothing outside of the attention has."""
_FUSED = ("qkv_proj", "W_pack", "query_key_value")
_NOT_TEXT = re.compile(r".*(vision|visual|image|audio|video|multi_modal|mm_projector|mtp|nextn|eh_proj).*")


def prove(checkpoint: Checkpoint, rows: Mapping[UnitKey, Rows]) -> None:
    """Compare the headers with the numbers that the configuration gave.

    Raises:
        InputError: naming the tensor, and the key or shape it contradicts.
    """
    config, has_experts = checkpoint.config, False
    for key, unit in rows.items():
        if key[0] != "layer":
            continue
        where = f"{checkpoint.path}: layer {key[1]}"
        state = config.attention[key[1]].state
        _check_modules(unit, state, where)
        _check_state(unit, state, where)
        _check_attention(unit, config, key[1], where)
        has_experts |= check_experts({n: shape for n, (_dtype, shape) in unit.items()}, config, where=where)
    if config.num_experts > 1 and not has_experts:
        raise InputError(
            f"config.json says {config.num_experts} experts, no layer holds tensors of experts",
            where=checkpoint.path,
            code="E-EXPERTS",
        )
    _check_leftovers(checkpoint)


def _check_leftovers(checkpoint: Checkpoint) -> None:
    for name in unexpected_tensors(checkpoint):
        if unit_of(name) is None and name.startswith("model.") and not _NOT_TEXT.fullmatch(name):
            raise _not_understood(f"{printable(name)} belongs to no unit", checkpoint.path)


def _check_modules(unit: Rows, state: State | None, where: str) -> None:
    recurrent = "" if state is None else state.shapes[0][0].partition(".")[0]
    for name in unit:
        inner = _ATTENTION.fullmatch(name)
        if name.partition(".")[0] == recurrent:
            continue
        if (
            not _KNOWN_MODULES.fullmatch(name)
            or (not inner and _KEYS.fullmatch(name))
            or (inner and not _KNOWN_PARTS.fullmatch(inner.group(1)))
        ):
            raise _not_understood(f"holds {printable(name)}", where)


def _check_state(unit: Rows, state: State | None, where: str) -> None:
    """The convolution and the decays of a recurrent layer have the sizes that its state was counted for."""
    for name, shape in () if state is None else state.shapes:
        if name not in unit:
            raise _not_understood(f"has no {name}", where)
        if unit[name][1] != shape:
            raise InputError(
                f"{name} has shape {list(unit[name][1])}, config.json implies {list(shape)}",
                where=where,
                code="E-SHAPE",
            )


def _check_attention(unit: Rows, config: ModelConfig, index: int, where: str) -> None:
    parts = {name: row for name, row in unit.items() if name.startswith("self_attn.")}
    stems = {name.split(".")[1] for name in parts}
    kv = config.attention[index].kv_width // 2
    if kv == 0:
        if not stems.isdisjoint(("k_proj", "v_proj", *_FUSED)):
            raise _not_understood("holds attention, config.json says it has none", where)
        return
    rope = config.attention[index].latent_rope
    if rope is not None:
        width = config.attention[index].kv_width
        key = f"kv_lora_rank + qk_rope_head_dim ({rope})"
        _require(parts, {"kv_a_proj_with_mqa": width}, key, config, where)
        return
    query = config.num_attention_heads * config.head_dim
    fused = next((stem for stem in _FUSED if stem in stems), None)
    widths = {fused: query + 2 * kv} if fused else {"k_proj": kv, "v_proj": kv}
    _require(parts, widths, "num_key_value_heads x head_dim", config, where)


def _require(parts: Rows, widths: Mapping[str, int], key: str, config: ModelConfig, where: str) -> None:
    """Every projection is there, and has as many rows as the key gives."""
    for stem, width in widths.items():
        held = [name for name in parts if name.startswith(f"self_attn.{stem}.")]
        if not held:
            seen = printable(next(iter(sorted(parts)), "no self_attn"), limit=60)
            raise _not_understood(f"has no self_attn.{stem} (but {seen})", where)
        weights = [name for name in held if name.rpartition(".")[2] in PACKED_NAMES]
        found = _num_outputs(logical_shape(weights[0], parts[weights[0]], parts, config), config) if weights else width
        if found != width:
            raise InputError(
                f"self_attn.{stem} gives {found} numbers per token, config.json says {width} ({key})",
                where=where,
                code="E-SHAPE",
            )


def _num_outputs(shape: tuple[int, ...], config: ModelConfig) -> int:
    """Rows of a matrix; bitsandbytes keeps those of 4 bits in one column."""
    return shape[0] if shape[-1] > 1 else math.prod(shape) // config.hidden_size


def _not_understood(what: str, where: object) -> InputError:
    return InputError(
        f"{what}, and what it keeps or costs is not understood",
        where=where,
        hint="this model cannot be sized here",
        code="E-FAMILY",
    )
