"""One unit's tensors -> its costs.

Sources: parameters and bytes are sums over tensors; a linear layer needs one multiply and one add per weight and token,
hence 2 FLOPs per weight; attention multiplies a query with every key and every value it sees, hence
4 x heads x head_dim FLOPs per token and token of context; the KV cache keeps one key and one value per KV head. Every
number of a recurrent state decays, takes in the token and is read: three multiplications and three additions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from planner.model import formula
from planner.model.experts import is_expert
from planner.model.packing import logical_shape
from plans.checkpoint.names import UnitKey, prefix_of
from plans.checkpoint.packed import is_kept
from plans.checkpoint.units import hash_shapes
from plans.config.attention import LayerAttention
from plans.config.config import ModelConfig
from plans.dtypes import DTYPES, STORED_DTYPES, DtypeName
from plans.gguf.names import is_scale
from plans.gguf.types import TYPES_BY_NAME
from plans.packed.choice import WeightChoice
from plans.packed.scheme import PACKED, Scheme
from plans.profile import PackedName, UnitProfile

Rows = Mapping[str, tuple[str, formula.Shape]]
"""Local tensor name -> (stored dtype, shape)."""

FLOPS_PER_WEIGHT = 2
STATE_FLOPS = 6
MATRIX = 2
NO_ATTENTION = LayerAttention(kv_width=0, score_width=0, window=None)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The configuration and dtypes that turn tensors into costs."""

    config: ModelConfig
    dtype: DtypeName
    kv_cache_dtype: DtypeName
    is_gguf: bool = False
    """Packed, with the shapes of the weights themselves."""
    choice: WeightChoice | None = None
    """How the matrices will be packed."""

    @property
    def has_logical_shapes(self) -> bool:
        """Whether the stored tensors are packed, and what they stand for is known."""
        return self.config.quantization is not None and formula.is_known(self.config) and not self.is_gguf


def profile_unit(key: UnitKey, rows: Rows, *, sizing: Sizing) -> UnitProfile:
    """Return the costs of one unit; see `UnitProfile` for units and meaning."""
    config, kind = sizing.config, key[0]
    is_layer, is_embedding = kind == "layer", kind == "embedding"
    shapes = _logical_shapes(key, rows, sizing)
    schemes = packed_matrices(key, rows, sizing)
    weight_bytes = {name: _chosen_bytes(name, row, schemes.get(name), sizing) for name, row in rows.items()}
    experts = {name for name, (_dtype, shape) in rows.items() if is_expert(name, shape, config)} if is_layer else set()
    idle_bytes = _idle(sum(size for name, size in weight_bytes.items() if name in experts), config)
    total_bytes = sum(weight_bytes.values())
    attention = config.attention[key[1]] if is_layer else NO_ATTENTION
    state = attention.state
    recurrent = state.recurrent if state else 0
    return UnitProfile(
        kind="layer" if is_layer else "embedding" if is_embedding else "head",
        index=key[1],
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        stored_weight_bytes=sum(_stored_bytes(row) for row in rows.values()),
        weight_bytes=total_bytes,
        decode_read_bytes=_row_bytes(total_bytes, sizing) if is_embedding else total_bytes - idle_bytes,
        kv_bytes_per_token=attention.kv_width * DTYPES[sizing.kv_cache_dtype].size_bytes,
        kv_window_tokens=attention.window,
        state_bytes_per_sequence=state.size_bytes(width=DTYPES[sizing.dtype].size_bytes) if state else 0,
        flops_per_token=0 if is_embedding else _flops_per_token(shapes, config) + STATE_FLOPS * recurrent,
        attention_flops_per_token_per_context=FLOPS_PER_WEIGHT * attention.score_width,
        shapes_sha256=hash_shapes(rows),
        weights=_packed_name(key, rows, schemes, sizing),
    )


def packed_matrices(key: UnitKey, rows: Rows, sizing: Sizing) -> dict[str, Scheme]:
    """Return which tensors of a unit will be packed, and how, by their local names."""
    choice = sizing.choice
    if choice is None:
        return {}
    matrices = {name: shape for name, (_dtype, shape) in rows.items() if len(shape) == MATRIX}
    found = {name: choice.scheme_of(module_of(key, name), out=out, in_=in_) for name, (out, in_) in matrices.items()}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _packed_name(key: UnitKey, rows: Rows, schemes: Mapping[str, Scheme], sizing: Sizing) -> PackedName | None:
    kinds, packing = set(schemes.values()), sizing.config.packing
    if packing is not None:
        stored = (module_of(key, name) for name in rows if name.endswith("." + PACKED))
        kinds |= {scheme for module in stored if (scheme := packing.scheme_of(module)) is not None}
    return None if not kinds else "int4" if min(kind.bits for kind in kinds) == 4 else "int8"


def module_of(key: UnitKey, name: str) -> str:
    """Return the module that a unit's tensor belongs to, from the tensor's local name.

    >>> module_of(("layer", 2), "mlp.up_proj.weight"), module_of(("head", 0), "lm_head.weight")
    ('model.layers.2.mlp.up_proj', 'lm_head')
    """
    return prefix_of(key) + name.rpartition(".")[0]


def _logical_shapes(key: UnitKey, rows: Rows, sizing: Sizing) -> formula.Shapes:
    """Quantised tensors are packed: count what they stand for where the family is known, else what is stored."""
    if sizing.is_gguf:
        return {name: (0,) if is_scale(name) else shape for name, (_dtype, shape) in rows.items()}
    if not sizing.has_logical_shapes:
        return {name: logical_shape(name, row, rows, sizing.config) for name, row in rows.items()}
    by_kind = {"embedding": formula.embedding_shapes, "layer": formula.layer_shapes, "head": formula.head_shapes}
    return by_kind[key[0]](sizing.config)


def _row_bytes(table_bytes: int, sizing: Sizing) -> int:
    """Bytes of one row of the embedding."""
    config = sizing.config
    return table_bytes // config.vocab_size if sizing.is_gguf else config.hidden_size * DTYPES[sizing.dtype].size_bytes


def _stored_bytes(row: tuple[str, formula.Shape]) -> int:
    dtype, shape = row
    if dtype in STORED_DTYPES:
        return math.prod(shape) * STORED_DTYPES[dtype].size_bytes
    return TYPES_BY_NAME[dtype].bytes_of(math.prod(shape))


def _chosen_bytes(name: str, row: tuple[str, formula.Shape], scheme: Scheme | None, sizing: Sizing) -> int:
    dtype, shape = row
    if scheme is not None:
        return scheme.size_bytes(*shape)
    if is_kept(name, dtype, sizing.config):
        return _stored_bytes(row)
    return math.prod(shape) * DTYPES[sizing.dtype].size_bytes


def _idle(experts: int, config: ModelConfig) -> int:
    """The part of all experts that one token does not touch."""
    return experts - (experts * config.num_experts_per_tok // config.num_experts if config.num_experts else experts)


def _flops_per_token(shapes: formula.Shapes, config: ModelConfig) -> int:
    linear = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) >= 2}
    experts = sum(size for name, size in linear.items() if is_expert(name, shapes[name], config))
    return FLOPS_PER_WEIGHT * (sum(linear.values()) - _idle(experts, config))
