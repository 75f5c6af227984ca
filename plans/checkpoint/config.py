"""`config.json` of a Hugging Face checkpoint, checked: only the fields that planning and running depend on.

Field names are those of `config.json`. Both spellings of renamed fields are read: `dtype` / `torch_dtype`, and
`rope_parameters` / `rope_theta` + `rope_scaling`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.checkpoint.fields import Fields
from plans.dtypes import DTYPE_NAMES, DtypeName
from plans.errors import InputError, printable
from plans.reading.files import read_limited, sha256_hex
from plans.reading.strict import parse_json

MAX_CONFIG_BYTES = 1 << 20

SUPPORTED_FAMILIES = (
    "gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""`model_type` of the families whose split was tested bit for bit against transformers."""

ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
"""Known rope types and the numbers each cannot do without."""

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8},
    "qwen2": {"num_key_value_heads": 32, "attention_bias": True, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "use_sliding_window": False},
}
"""What transformers' configuration classes assume for a key that is absent (not for one that is null)."""

_IMPLEMENTATION_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_OWN_IMPLEMENTATIONS = (None, "eager", "sdpa", "batched_mm", "grouped_mm")
"""Parts of torch and transformers themselves."""

@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checked configuration of a decoder-only model. Sizes are element counts."""

    model_type: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: DtypeName
    rope_type: str
    sliding_windows: tuple[int | None, ...]
    """Per layer: how many past tokens its attention sees, None for all."""
    num_experts: int
    num_experts_per_tok: int
    quantization: str | None
    runs_custom_code: bool
    sha256: str
    raw: Mapping[str, Any]


def read_config(path: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        InputError: malformed file, or a field that is missing, out of range or contradicts another.
        MachineError: not readable.
    """
    data = read_limited(path, max_bytes=MAX_CONFIG_BYTES)
    raw = parse_json(data, where=path)
    if not isinstance(raw, dict):
        raise InputError("not a JSON object", where=path, code="E-CONFIG")
    return parse_config(raw, where=path, sha256=sha256_hex(data))


def parse_config(raw: Mapping[str, Any], *, where: object, sha256: str = "") -> ModelConfig:
    """Check a configuration that is already parsed; errors as `read_config`."""
    fields = Fields(_with_family_defaults(raw), where)
    model_type = fields.text("model_type")
    heads = fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", default=heads)
    layers = fields.count("num_hidden_layers")
    has_head_dim = fields.raw.get("head_dim") is not None
    if not has_head_dim and hidden % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    experts = fields.count_of(("num_local_experts", "num_experts"), limit="num_experts", default=0)
    experts_per_token = fields.count("num_experts_per_tok", default=min(2, experts)) if experts else 0
    if experts_per_token > experts:
        raise fields.error("num_experts_per_tok", f"{experts_per_token} is more than the {experts} experts")
    return ModelConfig(
        model_type=model_type,
        architecture=_architecture(fields),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(fields, hidden, heads),
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count("max_position_embeddings", default=2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
        dtype=_dtype(fields),
        rope_type=_rope_type(fields),
        sliding_windows=_sliding_windows(fields, layers),
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        quantization=_quantization(fields),
        runs_custom_code=(
            bool(raw.get("auto_map")) or raw.get("trust_remote_code") is True or without_foreign_code(raw) != raw
        ),
        sha256=sha256,
        raw=raw,
    )


def without_foreign_code(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys by which it could have transformers fetch and run code from elsewhere.

    An attention named ``org/repository`` is downloaded and imported as soon as a model is built, even from a local
    folder; ``flash_attention_2`` is fetched in the same way where it is not installed.
    """
    return {
        key: value for key, value in raw.items() if key not in _IMPLEMENTATION_KEYS or value in _OWN_IMPLEMENTATIONS
    }


def _with_family_defaults(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    family = raw.get("model_type")
    defaults = dict(FAMILY_DEFAULTS.get(family, {})) if isinstance(family, str) else {}
    if "num_experts" in raw:
        defaults.pop("num_local_experts", None)
    return defaults | dict(raw)


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise fields.error("architectures", "is not a list of names")
    return names[0]


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    # head_dim is an independent field: several families store one that is not hidden_size / heads.
    return fields.count("head_dim", default=max(1, hidden // heads))


def _dtype(fields: Fields) -> DtypeName:
    value = fields.raw.get("dtype", fields.raw.get("torch_dtype")) or "float32"
    if not isinstance(value, str) or value not in DTYPE_NAMES:
        raise fields.error("dtype", f"is {printable(value, limit=40)}", expected="float32, float16 or bfloat16")
    return DTYPE_NAMES[value]


def _rope_type(fields: Fields) -> str:
    name = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    table = fields.raw.get(name)
    if not table:
        return "default"
    if not isinstance(table, dict):
        raise fields.error(name, "is not a table")
    tables = {k: v for k, v in table.items() if isinstance(v, dict)}
    if tables:  # one set of parameters per attention kind
        kinds = {_check_rope(fields, value, f"{name}/{key}") for key, value in tables.items()}
        return sorted(kinds)[0]
    return _check_rope(fields, table, name)


def _check_rope(fields: Fields, table: Mapping[str, Any], path: str) -> str:
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise fields.error(
            path, f"rope type {printable(kind, limit=40)} is not known", expected=" or ".join(ROPE_TYPES)
        )
    for name in ROPE_TYPES[kind]:
        if name.endswith("_factor") and isinstance(table.get(name), list):
            continue  # longrope lists one factor per frequency
        fields.number(table, name, path)
    if "rope_theta" in table:
        fields.number(table, "rope_theta", path)
    return kind


def _sliding_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    raw = fields.raw
    window = raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return (None,) * layers
    if type(window) is not int or window < 1:
        raise fields.error("sliding_window", f"is {printable(window, limit=40)}", expected="an integer above 0")
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = _default_layer_types(raw, layers)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error("layer_types", f"does not list {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _default_layer_types(raw: Mapping[str, Any], layers: int) -> list[str]:
    """The attention kinds transformers assumes for a family when `layer_types` is absent."""
    family = raw.get("model_type")
    sliding, full = "sliding_attention", "full_attention"
    if family == "gemma2":
        return [sliding if (i + 1) % 2 else full for i in range(layers)]
    if family in {"qwen2", "qwen3"}:
        first = raw.get("max_window_layers")
        first = first if type(first) is int else 28
        return [sliding if i >= first else full for i in range(layers)]
    return [sliding] * layers


def _quantization(fields: Fields) -> str | None:
    table = fields.raw.get("quantization_config")
    if table is None:
        return None
    method = table.get("quant_method") if isinstance(table, dict) else None
    return printable(method, limit=40) if isinstance(method, str) else "unknown"
