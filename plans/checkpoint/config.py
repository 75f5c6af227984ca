"""`config.json` of a Hugging Face checkpoint, checked: only the fields that planning and running depend on.

Field names are those of `config.json`. Both spellings of renamed fields are read: `dtype` / `torch_dtype`, and
`rope_parameters` / `rope_theta` + `rope_scaling`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

_LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
}

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
    fields = _Fields(_with_family_defaults(raw), where)
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


class _Fields:
    """Typed access to a configuration, with errors that name the field and the range."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw = raw
        self.where = where

    def error(self, name: str, what: str, *, expected: str = "") -> InputError:
        return InputError(what, where=f"{self.where}:/{name}", expected=expected, code="E-CONFIG")

    def count(self, name: str, *, default: int | None = None) -> int:
        return self.count_of((name,), limit=name, default=default)

    def count_of(self, names: tuple[str, ...], *, limit: str, default: int | None) -> int:
        """Return a whole number above zero; absent (or null, where there is a default) means the default."""
        name = next((n for n in names if n in self.raw), names[0])
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= _LIMITS[limit]:
            found = "is missing" if name not in self.raw else f"is {printable(value, limit=40)}"
            raise self.error(name, found, expected=f"an integer from 1 to {_LIMITS[limit]}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(name, f"is {printable(value, limit=40)}", expected="true or false")
        return value

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not value:
            found = "is missing" if value is None else f"is {printable(value, limit=40)}"
            raise self.error(name, found, expected="a name such as 'llama'")
        return value

    def number(self, table: Mapping[str, Any], name: str, path: str) -> float:
        value = table.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            found = "is missing" if name not in table else f"is {printable(value, limit=40)}"
            raise self.error(f"{path}/{name}", found, expected="a number above 0")
        return float(value)


def _architecture(fields: _Fields) -> str:
    names = fields.raw.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise fields.error("architectures", "is not a list of names")
    return names[0]


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    # head_dim is an independent field: several families store one that is not hidden_size / heads.
    return fields.count("head_dim", default=max(1, hidden // heads))


def _dtype(fields: _Fields) -> DtypeName:
    value = fields.raw.get("dtype", fields.raw.get("torch_dtype")) or "float32"
    if not isinstance(value, str) or value not in DTYPE_NAMES:
        raise fields.error("dtype", f"is {printable(value, limit=40)}", expected="float32, float16 or bfloat16")
    return DTYPE_NAMES[value]


def _rope_type(fields: _Fields) -> str:
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


def _check_rope(fields: _Fields, table: Mapping[str, Any], path: str) -> str:
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


def _sliding_windows(fields: _Fields, layers: int) -> tuple[int | None, ...]:
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


def _quantization(fields: _Fields) -> str | None:
    table = fields.raw.get("quantization_config")
    if table is None:
        return None
    method = table.get("quant_method") if isinstance(table, dict) else None
    return printable(method, limit=40) if isinstance(method, str) else "unknown"
