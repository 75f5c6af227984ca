"""Which calls of a model's forward are plain steps of generation, such as the fast path can serve."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}


@dataclass(frozen=True, slots=True)
class PlainStep:
    """What a step is made of.

    Attributes:
        input_ids: [B, S].
        attention_mask: [B, T], or None when nothing is padded.
        position_ids: [B or 1, S], or None to count from the cache's length.
        cache: what it extends.
        logits_to_keep: how many of the last positions get logits; 0 for all.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: DynamicCache
    logits_to_keep: int


def plain_step(arguments: Mapping[str, Any], config: PreTrainedConfig) -> PlainStep | None:
    """Return the step that a forward's arguments ask for, or None if they ask for anything beyond.

    Gradients, attention weights, hidden states, a loss, embeddings as input, tuples as output and caches of another
    kind are for transformers.
    """
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    cache, keep = arguments.get("past_key_values"), arguments.get("logits_to_keep", 0)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not isinstance(cache, DynamicCache):
        return None
    is_plain = (
        isinstance(keep, int)
        and (mask is None or isinstance(mask, torch.Tensor))
        and arguments.get("use_cache") is not False
        and arguments.get("return_dict", config.return_dict) in (None, True)
    )
    wants_more = (
        torch.is_grad_enabled()
        or bool(config.output_attentions or config.output_hidden_states)
        or any(value is not None and value is not False for name, value in arguments.items() if name not in _KNOWN)
    )
    return PlainStep(ids, mask, arguments.get("position_ids"), cache, keep) if is_plain and not wants_more else None
