"""The text part of a configuration: a model of text and images keeps it in a table of its own."""

import re
from collections.abc import Mapping
from typing import Any

from plans.errors import InputError, printable

TEXT_KEYS = ("text_config", "llm_config", "language_config")
"""Where the text model lies: in transformers, and in the vendors' own code (InternVL, Ovis; DeepSeek-VL, Janus)."""
THINKER_KEY = "thinker_config"
"""The part of Qwen's Omni models that writes text; its text model lies inside of it. The talker is left out."""
_NO_TEXT = re.compile(r"vision|visual|image|audio|speech|video|talker|wav|encoder|former|perceiver|resampler")
_SHARED = ("tie_word_embeddings", "quantization_config")
_DTYPES = ("dtype", "torch_dtype")
_OF_WHOLE = (*_SHARED, *_DTYPES, "model_type")

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
CLASS_SIZES: Mapping[str, tuple[int, ...]] = {
    "llama": (4096, 11008, 32, 32, 32, 32000, 2048),
    "mistral": (4096, 14336, 32, 32, 8, 32000, 131072),
    "qwen2": (4096, 22016, 32, 32, 32, 151936, 32768),
    "gemma3_text": (2304, 9216, 26, 8, 4, 262208, 131072),
}
"""What transformers' configuration classes assume, in the order of `_SIZES`: text parts state what differs."""


def text_part(raw: Mapping[str, Any], *, where: object) -> tuple[Mapping[str, Any], str | None]:
    """Return the configuration of the text model, and the `model_type` of the whole where it is only a part of one.

    The whole's word on dtype, ties and quantisation counts for its parts, as in transformers. Where neither says
    whether the embeddings are tied, the weights do: tied, unless a head of another content is stored.

    Raises:
        InputError: two text models of which neither is the other.

    Example:
        >>> raw = {"model_type": "llava", "dtype": "float16", "text_config": {"model_type": "llama"}}
        >>> text, whole = text_part(raw, where="config.json")
        >>> text["dtype"], text["num_hidden_layers"], whole
        ('float16', 32, 'llava')
    """
    thinker, whole = raw.get(THINKER_KEY), raw
    if isinstance(thinker, dict):
        whole = thinker | {key: raw[key] for key in _OF_WHOLE if raw.get(key) is not None}
    key = _text_key(whole, where)
    for table in (whole[key],) if key else (raw, whole):
        _refuse_other_nesting(table, where)
    if key is None:
        return raw, None
    inner = whole[key]
    sizes = CLASS_SIZES.get(str(inner.get("model_type")), ())
    text = dict(zip(_SIZES, sizes, strict=False)) | dict(inner)
    if "num_key_value_heads" not in inner and "num_attention_heads" in inner and inner.get("model_type") == "llama":
        del text["num_key_value_heads"]  # its class takes one per head
    if any(whole.get(key) for key in _DTYPES):
        text = {key: value for key, value in text.items() if key not in _DTYPES}
        text |= {key: whole[key] for key in _DTYPES if whole.get(key)}
    text |= {key: whole[key] for key in _SHARED if whole.get(key) is not None}
    if text.get("tie_word_embeddings") is None:
        text["tie_word_embeddings"] = True
    name = whole.get("model_type")
    return text, name if isinstance(name, str) else key


def _refuse_other_nesting(raw: Mapping[str, Any], where: object) -> None:
    """Name the table that holds the sizes of a text model in a place that nobody is known to use."""
    if "num_hidden_layers" in raw:
        return
    for key, value in raw.items():
        is_table = isinstance(value, dict) and "num_hidden_layers" in value and not _NO_TEXT.search(key)
        if is_table or (key in (*TEXT_KEYS, THINKER_KEY) and value is not None and not isinstance(value, dict)):
            raise InputError(
                "holds the sizes of a model where none are expected" if is_table else "is not a table",
                where=f"{where}:/{printable(key, limit=60)}",
                expected=f"a text model in one of {', '.join(TEXT_KEYS)}, {THINKER_KEY}/{TEXT_KEYS[0]}",
                code="E-CONFIG",
            )


def _text_key(raw: Mapping[str, Any], where: object) -> str | None:
    found = [key for key in TEXT_KEYS if isinstance(raw.get(key), dict)]
    other = next((key for key in found if raw[key] != raw[found[0]]), None)
    if other is not None:
        raise InputError(
            f"{found[0]} and {other} are two text models, and which of them runs is not said",
            where=f"{where}:/{other}",
            expected="one of them",
            code="E-CONFIG",
        )
    return found[0] if found else None
