"""Steps of a whole causal language model on the CPU fast path, with transformers' own inputs and cache."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from runtime.fast import FastStage, first_slots, supports, supports_weights
from runtime.fast_cache import FastLayer, adopt
from runtime.native import Library, Unavailable


class FastModel:
    """A model whose layers and head run on the native kernels; embedding and rotary tables stay with transformers.

    Example:
        >>> fast = FastModel.of(model, kernels)  # doctest: +SKIP
        >>> logits = fast.step(token_ids, attention_mask=mask, position_ids=positions, cache=cache)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, library: Library) -> None:
        """Take a model for which `of` found no reason against it."""
        self._model: Any = model
        base: Any = model.base_model
        self._stage = FastStage(library, base.layers, model.config, norm=base.norm, head=self._model.lm_head)
        self._multiplier = getattr(base, "embedding_multiplier", 1.0)

    @classmethod
    def of(cls, model: PreTrainedModel, library: Library) -> "FastModel | Unavailable":
        """Return the fast form of a causal language model, or why there is none."""
        reason = supports(model.config) or supports_weights([model])
        return Unavailable(reason) if reason else cls(model, library)

    @torch.no_grad()
    def step(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
        logits_to_keep: int = 1,
    ) -> torch.Tensor | None:
        """Run new tokens through the model and extend the cache by them.

        Args:
            input_ids: [B, S].
            attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
            position_ids: [B or 1, S]; None counts from the cache's length.
            cache: a `DynamicCache`; its layers become `FastLayer`s at the first step.
            logits_to_keep: how many of the last positions get logits; 0 for all.

        Returns:
            Logits [B, logits_to_keep or S, V] in the model's dtype, or None, with nothing changed, where the kernels
            cannot do it: a mask that is not plain left padding, or a cache of another kind.
        """
        batch, new_tokens = input_ids.shape
        base, past = self._model.base_model, int(cache.get_seq_length())
        start = first_slots(attention_mask, batch=batch)
        if start is None or (attention_mask is not None and attention_mask.shape[1] != past + new_tokens):
            return None
        if not adopt(cache, num_layers=len(base.layers)):
            return None
        if position_ids is None:
            position_ids = torch.arange(past, past + new_tokens)[None]
        hidden = base.embed_tokens(input_ids)  # [B, S, E]
        if self._multiplier != 1.0:
            hidden = hidden * self._multiplier
        cos, sin = base.rotary_emb(hidden, position_ids=position_ids)
        hidden = self._stage.decode(hidden, cos, sin, start=start, cache=cast("list[FastLayer]", cache.layers))
        return self._stage.head(hidden[:, -logits_to_keep:])
