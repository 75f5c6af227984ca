"""The longest context a configuration allows: what the model was trained for, or as far as its rope scaling reaches."""

from collections.abc import Mapping
from typing import Any

SCALED_ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")
"""Rope types that stretch an original length by a factor. longrope's factors lead to max_position_embeddings itself."""


def rope_table(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the key and the value of the rotary settings; of two spellings `rope_scaling` wins, as in transformers."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return name, raw.get(name)


def longest_context(raw: Mapping[str, Any], *, max_position_embeddings: int) -> int:
    """Return how many tokens a sequence may have.

    With rope scaling that is the original length times the factor, if that is more than max_position_embeddings. The
    original length is `original_max_position_embeddings`, else max_position_embeddings, as vLLM's and Qwen's
    documentation read a configuration (32,768 x 4 = 131,072 in Qwen's recipe for YaRN).

    Args:
        raw: a checked `config.json`.
        max_position_embeddings: its value, or the default for it.
    """
    _, table = rope_table(raw)
    if not isinstance(table, Mapping) or _counts_scaling_already(raw):
        return max_position_embeddings
    if table.get("rope_type", table.get("type")) not in SCALED_ROPE_TYPES:
        return max_position_embeddings
    original = table.get("original_max_position_embeddings") or max_position_embeddings
    return max(max_position_embeddings, int(original * (table.get("factor") or 1)))


def beyond_context(context_tokens: int, *, longest: int, trained: int) -> str:
    """Return the sentence about a context that is too long, with all numbers."""
    reach = f" and its rope scaling reaches {longest}" if longest > trained else ""
    return f"{context_tokens} tokens are more than the model was trained for ({trained}){reach}"


def _counts_scaling_already(raw: Mapping[str, Any]) -> bool:
    """Gemma 3's max_position_embeddings is the length after scaling."""
    return str(raw.get("model_type")).startswith("gemma3")
