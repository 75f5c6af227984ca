"""The text part of a configuration: a model of text and images keeps it in a table of its own."""

from collections.abc import Mapping
from typing import Any

TEXT_KEY = "text_config"
_SHARED = ("tie_word_embeddings", "quantization_config")
_DTYPES = ("dtype", "torch_dtype")

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


def text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Return the configuration of the text model, and the `model_type` of the whole where it is only a part of one.

    The whole's word on dtype, ties and quantisation counts for its parts, as in transformers. Where neither says
    whether the embeddings are tied, the weights do: tied, unless a head of another content is stored.

    Example:
        >>> text, whole = text_part({"model_type": "llava", "dtype": "float16", "text_config": {"model_type": "llama"}})
        >>> text["dtype"], text["num_hidden_layers"], whole
        ('float16', 32, 'llava')
    """
    inner = raw.get(TEXT_KEY)
    if not isinstance(inner, dict):
        return raw, None
    sizes = CLASS_SIZES.get(str(inner.get("model_type")), ())
    text = dict(zip(_SIZES, sizes, strict=False)) | dict(inner)
    if "num_key_value_heads" not in inner and "num_attention_heads" in inner and inner.get("model_type") == "llama":
        del text["num_key_value_heads"]  # its class takes one per head
    if any(raw.get(key) for key in _DTYPES):
        text = {key: value for key, value in text.items() if key not in _DTYPES}
        text |= {key: raw[key] for key in _DTYPES if raw.get(key)}
    text |= {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    if text.get("tie_word_embeddings") is None:
        text["tie_word_embeddings"] = True
    whole = raw.get("model_type")
    return text, whole if isinstance(whole, str) else TEXT_KEY
