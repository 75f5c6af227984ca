"""KV caches: transformers' own, and one that keeps keys and values in another dtype than the model computes in.

Shapes: B sequences, K key heads, S new slots, T all slots, D head size.
"""

from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def new_cache(config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> DynamicCache:
    """Return an empty cache for a model.

    Args:
        config: the model's configuration, with the dtype it computes in.
        dtype: what keys and values are kept in; None, or the model's own, for transformers' cache as it is.

    Example:
        >>> from transformers import LlamaConfig
        >>> len(new_cache(LlamaConfig(num_hidden_layers=3), dtype=torch.bfloat16).layers)
        3
    """
    cache = DynamicCache(config=config)
    if dtype is not None and dtype != config.dtype:
        cache.layers = [_keeping(cast("DynamicLayer", layer), dtype) for layer in cache.layers]
    return cache


class KeptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's cache in a dtype of its own: rounded on the way in, widened for the one layer that computes."""

    kept_dtype: torch.dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, K, S, D] and return all slots [B, K, T, D] in the dtype of what was given."""
        kept = key_states.to(self.kept_dtype), value_states.to(self.kept_dtype)
        keys, values = super().update(*kept, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class KeptSlidingLayer(KeptLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same for a layer that only looks back so far."""


def _keeping(layer: DynamicLayer, dtype: torch.dtype) -> KeptLayer:
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept: KeptLayer = KeptSlidingLayer(layer.sliding_window)
    else:
        kept = KeptLayer()  # type: ignore[no-untyped-call]
    kept.kept_dtype = dtype
    return kept
