"""How many past tokens every layer of an allow-listed family sees, as its class in transformers reads `config.json`."""

from collections.abc import Mapping
from typing import Any

from plans.config.attention import SLIDING, Windows, check_layer_types, rope_layers
from plans.config.fields import Fields, as_stated
from plans.config.states import FULL

ONE_MASK = ("mistral", "mixtral", "phi3", "qwen3_moe")
"""Families whose forward fails on a prompt longer than the window where layers keep different numbers of tokens."""


def sliding_windows(fields: Fields, layers: int) -> Windows:
    """Return how many past tokens each layer of an allow-listed family sees, None for all.

    Raises:
        InputError: layers that slide without a window, or values out of range.
    """
    raw = fields.raw
    if raw.get("layer_types") is not None:
        check_layer_types(fields, raw["layer_types"], layers, allowed=(FULL, SLIDING))
    window = raw.get("sliding_window")
    _refuse_windows_of_no_size(fields, window)
    if window is None or (_is_unused(raw) and raw.get("model_type") in _UNSIZED_WHEN_UNUSED):
        return (None,) * layers
    if type(window) is not int or window < 1:
        raise fields.error("sliding_window", f"is {as_stated(window)}", expected="an integer above 0")
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = _default_layer_types(fields, layers)
    return tuple(window if kind == SLIDING else None for kind in kinds)


_UNSIZED_WHEN_UNUSED = {"qwen2", "qwen3", "qwen3_moe"}
"""Families whose class forgets `sliding_window` where `use_sliding_window` is false; most do not know that key."""


def _is_unused(raw: Mapping[str, Any]) -> bool:
    return raw.get("use_sliding_window") is False


def _refuse_windows_of_no_size(fields: Fields, window: object) -> None:
    """transformers cannot build a layer of the kind sliding_attention without the size of its window."""
    raw = fields.raw
    kinds = raw.get("layer_types") or ([SLIDING] if raw.get("model_type") == "gemma2" else [])
    if SLIDING not in kinds:
        return
    if _is_unused(raw) and raw.get("model_type") in _UNSIZED_WHEN_UNUSED:
        raise fields.error("use_sliding_window", f"is false, and layers are of the kind {SLIDING}", expected="true")
    if window is None:
        raise fields.error(
            "sliding_window", f"is missing, and layers are of the kind {SLIDING}", expected="an integer above 0"
        )


def _default_layer_types(fields: Fields, layers: int) -> list[str]:
    """The attention kinds transformers assumes for a family when `layer_types` is absent."""
    raw = fields.raw
    family = raw.get("model_type")
    if family == "gemma2":
        return [SLIDING if (i + 1) % 2 else FULL for i in range(layers)]
    if family in {"qwen2", "qwen3"}:
        first = raw.get("max_window_layers")
        first = first if type(first) is int else 28
        return [SLIDING if i >= first else FULL for i in range(layers)]
    if family == "smollm3":  # only the layers without rotary positions forget
        return [FULL if rotary or _is_unused(raw) else SLIDING for rotary in rope_layers(fields, layers, every=4)]
    return [SLIDING] * layers
