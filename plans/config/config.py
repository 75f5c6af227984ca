"""`config.json` of a Hugging Face checkpoint, checked: only the fields that planning and running depend on.

Field names are those of `config.json`. Both spellings of renamed fields are read: `dtype` / `torch_dtype`, and
`rope_parameters` / `rope_theta` + `rope_scaling`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plans.config.attention import (
    Heads,
    LayerAttention,
    Origin,
    block_intermediate_size,
    is_latent,
    plain_layers,
    query_head_dim,
    read_layers,
)
from plans.config.context import longest_context, rope_table
from plans.config.experts import ACTIVE_KEYS, TOTAL_KEYS, read_experts
from plans.config.families import CLASS_CONTEXTS, class_defaults
from plans.config.fields import Fields, as_stated
from plans.config.text_part import text_part
from plans.config.values import CONFIG_VALUES, ROPE_VALUES, check_values
from plans.config.windows import sliding_windows
from plans.dtypes import DTYPE_NAMES, DtypeName
from plans.errors import InputError, printable
from plans.packed.config import Packing, read_packing
from plans.reading.files import read_limited, sha256_hex
from plans.reading.strict import parse_json

MAX_CONFIG_BYTES = 1 << 20
# No JSON, but what transformers 4 wrote of every Mamba-2 model; 5 writes it as a table.
_INFINITE_LIMIT = re.compile(rb'("time_step_limit"\s*:\s*\[\s*[0-9.]+\s*,\s*)Infinity(?=\s*\])')

SUPPORTED_FAMILIES = (
    "gemma", "gemma2", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe",
    "smollm3",
)  # fmt: skip
"""`model_type` of the families whose split was tested bit for bit against transformers."""

ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
"""Known rope types and the numbers each cannot do without."""

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 131072},
    "phi3": {"max_position_embeddings": 4096},
    "qwen2": {
        "num_key_value_heads": 32,
        "attention_bias": True,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
    },
}
"""What transformers' configuration classes assume for a key that is absent (not for one that is null)."""

ASSUMED_CONTEXT = 2048
"""`max_position_embeddings` where neither `config.json` nor the class is known to say it."""
MAX_CONTEXT = 1 << 31
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_modules")
"""How many layers behind the last one only predict further tokens."""
CONTEXT_KEY = "max_position_embeddings"

_NO_HEAD = re.compile(r"For(Sequence|Token)Classification$|ForQuestionAnswering$|RewardModel$")

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
    attention: tuple[LayerAttention, ...]
    """Per layer: what it keeps of a token, and of how many."""
    num_mtp_layers: int
    """Layers stored behind the last one that only predict further tokens; they are no part of the chain."""
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    """Rows of one routed expert of a family on the allow-list."""
    quantization: str | None
    packing: Packing | None
    """How its weights are packed, where that is a way the runtime reads; None for other quantised ones, too."""
    runs_custom_code: bool
    origins: tuple[Origin, ...]
    """Where numbers of a family outside the allow-list come from."""
    sha256: str
    raw: Mapping[str, Any]
    part_of: str | None = None
    """`model_type` of the model this is the text part of; None for a model of its own."""

    @property
    def states_dtype(self) -> bool:
        """Whether `dtype` was stated; otherwise it is only what transformers assumes without weights."""
        return bool(self.raw.get("dtype") or self.raw.get("torch_dtype"))

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """Per layer: how many past tokens its attention sees, None for all."""
        return tuple(layer.window for layer in self.attention)

    @property
    def is_supported(self) -> bool:
        """Whether the family is on the allow-list."""
        return _is_supported(self.raw)

    @property
    def longest_context_tokens(self) -> int:
        """The longest context it allows; see `plans.config.context`."""
        return longest_context(self.raw, max_position_embeddings=self.max_position_embeddings)


def read_config(path: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        InputError: malformed file, or a field that is missing, out of range or contradicts another.
        MachineError: not readable.
    """
    data = read_limited(path, max_bytes=MAX_CONFIG_BYTES)
    raw = parse_json(_INFINITE_LIMIT.sub(rb'\1{"__float__": "Infinity"}', data), where=path)
    if not isinstance(raw, dict):
        raise InputError("not a JSON object", where=path, code="E-CONFIG")
    return parse_config(raw, where=path, sha256=sha256_hex(data))


def parse_config(raw: Mapping[str, Any], *, where: object, sha256: str = "") -> ModelConfig:
    """Check a configuration that is already parsed, of a larger model its text part; errors as `read_config`."""
    raw, part_of = text_part(raw, where=where)
    # What a null means is the class's matter; those of families on the list were tried.
    stated = raw if _is_supported(raw) else {key: value for key, value in raw.items() if value is not None}
    check_values(stated, CONFIG_VALUES, where=where)
    fields = Fields(_with_family_defaults(raw), where)
    if _is_supported(raw) and raw.get("tie_word_embeddings", False) is None:  # transformers refuses it too
        raise fields.error("tie_word_embeddings", "is null", expected="true or false")
    model_type = fields.text("model_type")
    heads, layers = _heads(fields), fields.count("num_hidden_layers")
    attention, origins = _attention(fields, heads, layers)
    experts, experts_per_token, more_origins = _experts(fields)
    return ModelConfig(
        model_type=model_type,
        architecture=_architecture(fields),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=_intermediate_size(fields, experts_per_token, attention),
        num_hidden_layers=layers,
        num_attention_heads=heads.heads,
        num_key_value_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count(CONTEXT_KEY, default=CLASS_CONTEXTS.get(model_type, ASSUMED_CONTEXT)),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=fields.flag("attention_bias", default=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
        dtype=_dtype(fields),
        rope_type=_rope_type(fields),
        attention=attention,
        num_mtp_layers=max(map(fields.whole, MTP_KEYS)),
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        expert_intermediate_size=_expert_intermediate_size(fields),
        quantization=_quantization(fields),
        packing=_packing(raw),
        runs_custom_code=(
            bool(raw.get("auto_map")) or raw.get("trust_remote_code") is True or without_foreign_code(raw) != raw
        ),
        origins=origins + more_origins + _other_origins(raw, fields),
        sha256=sha256,
        raw=raw,
        part_of=part_of,
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
    if not _is_supported(raw):
        return _without_other_spellings(class_defaults(family), raw) | dict(raw)
    defaults = dict(FAMILY_DEFAULTS.get(str(family), {}))
    if not raw.keys().isdisjoint(_NUM_EXPERTS):
        defaults = {key: value for key, value in defaults.items() if key not in _NUM_EXPERTS}
    return defaults | dict(raw)


def _without_other_spellings(defaults: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """A default counts only where no spelling of its key is there."""
    said = {key for names in (TOTAL_KEYS, ACTIVE_KEYS) if raw.keys() & set(names) for key in names}
    return {key: value for key, value in defaults.items() if key not in said}


def _is_supported(raw: Mapping[str, Any]) -> bool:
    family = raw.get("model_type")
    return isinstance(family, str) and family in SUPPORTED_FAMILIES and not _has_dense_layers(raw)


def _has_dense_layers(raw: Mapping[str, Any]) -> bool:
    """Whether a Qwen3-MoE has layers without experts; it is then sized by its headers alone."""
    is_dense = any(raw.get(key) == 0 for key in _NUM_EXPERTS)
    is_mixed = bool(raw.get("mlp_only_layers")) or raw.get("decoder_sparse_step", 1) != 1
    return raw.get("model_type") == "qwen3_moe" and (is_dense or is_mixed)


def _heads(fields: Fields) -> Heads:
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    if not _is_supported(fields.raw) and is_latent(fields.raw):
        return Heads(heads, fields.count("num_key_value_heads", default=heads), query_head_dim(fields))
    kv_heads = fields.count("num_key_value_heads", default=heads)
    if fields.raw.get("head_dim") is None and hidden % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    # head_dim is an independent field: several families store one that is not hidden_size / heads.
    return Heads(heads, kv_heads, fields.count("head_dim", default=max(1, hidden // heads)))


def _attention(fields: Fields, heads: Heads, layers: int) -> tuple[tuple[LayerAttention, ...], tuple[Origin, ...]]:
    if not _is_supported(fields.raw):
        return read_layers(fields, heads, layers)
    return plain_layers(heads, sliding_windows(fields, layers)), ()


def _experts(fields: Fields) -> tuple[int, int, tuple[Origin, ...]]:
    if not _is_supported(fields.raw):
        return read_experts(fields)
    if fields.raw.get("model_type") != "mixtral" and all(fields.raw.get(name) in (None, 0) for name in _NUM_EXPERTS):
        return 0, 0, ()  # "num_local_experts": 0 is a dense model
    experts = fields.count_of(_NUM_EXPERTS, limit="num_experts", default=None)
    active = fields.count("num_experts_per_tok", default=min(2, experts))
    if active > experts:
        raise fields.error("num_experts_per_tok", f"{active} is more than the {experts} experts")
    return experts, active, ()


def _intermediate_size(fields: Fields, experts_per_token: int, attention: tuple[LayerAttention, ...]) -> int:
    """The widest row inside a layer: of a dense one, of the experts that one token uses, or of a recurrent one."""
    if _is_supported(fields.raw) and fields.raw["model_type"] != "qwen3_moe":
        return fields.count("intermediate_size")
    blocks = block_intermediate_size(fields)
    dense = [fields.count(key) for key in _DENSE_WIDTHS if fields.raw.get(key) is not None]
    routed = [experts_per_token * fields.count(key) for key in _EXPERT_WIDTHS if fields.raw.get(key) is not None]
    shared = [fields.count(key) for key in _SHARED_WIDTHS if fields.raw.get(key)]
    recurrent = [layer.state.row_width for layer in attention if layer.state is not None]
    widest = max([blocks, *dense, sum(routed[:1]) + sum(shared), *recurrent])
    return widest or fields.count("intermediate_size")


_DENSE_WIDTHS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "dense_intermediate_size",
    "block_ff_dim",
)
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "expert_dim")
_NUM_EXPERTS = ("num_local_experts", "num_experts")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")


def _expert_intermediate_size(fields: Fields) -> int:
    name = "moe_intermediate_size" if fields.raw["model_type"] == "qwen3_moe" else "intermediate_size"
    return fields.count(name) if _is_supported(fields.raw) else 0


def _other_origins(raw: Mapping[str, Any], fields: Fields) -> tuple[Origin, ...]:
    family = raw.get("model_type")
    if _is_supported(raw):
        return ()
    found = []
    if "tie_word_embeddings" not in raw and "tie_word_embeddings" in fields.raw:
        how = f"not in config.json; the class of {family} ties head and embedding in transformers"
        found.append(Origin("tied", "tie_word_embeddings", how))
    if raw.get(CONTEXT_KEY) is None:
        said = CLASS_CONTEXTS.get(fields.text("model_type"))
        why = f"the class of {family} assumes it in transformers" if said else f"the class of {family} is not known"
        how = f"not in config.json; {said or ASSUMED_CONTEXT} tokens are assumed: {why}"
        found.append(Origin(CONTEXT_KEY, CONTEXT_KEY, how))
    for key in MTP_KEYS:
        if extra := fields.whole(key):
            how = f"{extra} stored behind the last layer, for predicting further tokens: left out"
            found.append(Origin("num_hidden_layers", key, how))
    return tuple(found)


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise fields.error("architectures", f"is {as_stated(names)}", expected="a list of names")
    if names and _NO_HEAD.search(names[0]):
        what = f"{printable(names[0], limit=60)} judges texts and writes none: it has no head over the vocabulary"
        raise fields.error("architectures/0", what, expected="a causal language model, such as LlamaForCausalLM")
    return names[0] if names else ""


def _dtype(fields: Fields) -> DtypeName:
    key = next((key for key in ("dtype", "torch_dtype") if fields.raw.get(key) is not None), None)
    value = fields.raw[key] if key else "float32"
    if not isinstance(value, str) or value not in DTYPE_NAMES:
        raise fields.error(str(key), f"is {as_stated(value)}", expected="float32, float16 or bfloat16")
    return DTYPE_NAMES[value]


def _rope_type(fields: Fields) -> str:
    name, table = rope_table(fields.raw)
    if not table:
        return "default"
    if not isinstance(table, dict):
        raise fields.error(name, "is not a table")
    tables = {key: value for key, value in table.items() if key.endswith("_attention") and value is not None}
    if tables:  # one set of parameters per attention kind
        for key, value in tables.items():
            if not isinstance(value, dict):
                raise fields.error(f"{name}/{key}", f"is {as_stated(value)}", expected="a table")
        kinds = {_check_rope(fields, value, f"{name}/{key}") for key, value in tables.items()}
        return sorted(kinds)[0]
    return _check_rope(fields, table, name)


def _check_rope(fields: Fields, table: Mapping[str, Any], path: str) -> str:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "mrope" and not _is_supported(fields.raw):
        kind = "default"  # three positions for every token, in models that see; as transformers reads it
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise fields.error(path, f"rope type {as_stated(kind)} is not known", expected=" or ".join(ROPE_TYPES))
    check_values(table, ROPE_VALUES, where=fields.where, inside=f"/{path}")
    reach = table.get("factor") or 1, table.get("original_max_position_embeddings") or 1
    if not all(number <= MAX_CONTEXT for number in reach):
        raise fields.error(path, f"stretches the context by {reach[0]} x {reach[1]}", expected=f"up to {MAX_CONTEXT}")
    for name in ROPE_TYPES[kind]:
        if name.endswith("_factor") and isinstance(table.get(name), list):
            continue  # longrope lists one factor per frequency
        fields.number(table, name, path)
    return kind


def _quantization(fields: Fields) -> str | None:
    table = fields.raw.get("quantization_config")
    if table is None and fields.raw.get("compression_config") is not None:
        what = "is what older tools called quantization_config, and transformers reads only that"
        raise fields.error("compression_config", what, expected="the same table under quantization_config")
    if table is None:
        return None
    method = table.get("quant_method") if isinstance(table, dict) else None
    if method is not None and not isinstance(method, str):
        raise fields.error("quantization_config/quant_method", f"is {printable(method, limit=40)}", expected="a name")
    return printable(method, limit=40) if method else "unknown"


def _packing(raw: Mapping[str, Any]) -> Packing | None:
    if not _is_supported(raw):
        return None
    try:
        return read_packing(raw)
    except InputError:
        return None
