"""What computes a step's tokens: a whole chain, or one stage of it.

Shapes: S new tokens, R sequences with one new token each, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from runtime.fast.slots import SlotCache, supports_slots
from runtime.reading.devices import synchronize
from runtime.stage_time import FAST_PATH
from runtime.stages.chain import Chain
from runtime.stages.stage import Stage


class OwnCaches:
    """A cache of its own for every slot.

    Args:
        new_cache: makes an empty one; None where nothing is kept.
    """

    def __init__(self, new_cache: Callable[[], Any]) -> None:
        self._new_cache = new_cache
        self._caches: dict[int, Any] = {}

    def __getitem__(self, slot: int) -> Any:
        """Return the cache of a slot."""
        if slot not in self._caches:
            self._caches[slot] = self._new_cache()
        return self._caches[slot]

    def keep(self, slot: int, *, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of a slot."""
        if num_tokens == 0:
            self.release(slot)
        elif (cache := self[slot]) is not None and (surplus := cache.get_seq_length() - num_tokens):
            cache.crop(-surplus)

    def release(self, slot: int) -> None:
        """Forget all tokens of a slot."""
        self._caches.pop(slot, None)


Caches = OwnCaches | SlotCache


def can_share(cache: Cache, config: PreTrainedConfig, *, capacity: int) -> bool:
    """Return whether sequences of up to `capacity` tokens can lie in one `SlotCache`, which keeps every token."""
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return supports_slots(config) is None and min(windows, default=capacity) >= capacity


def most_slots(config: PreTrainedConfig) -> int | None:
    """Return 1 where the rotary factors remember the longest sequence so far: others would change them. Else None."""
    return 1 if _rope_type(config) == "dynamic" else None


def _rope_type(config: PreTrainedConfig) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def _begin(model: Any) -> None:
    """Let rotary factors forget the sequences before this one."""
    if _rope_type(model.config) == "dynamic":
        rotary = model.base_model.rotary_emb
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq.copy_(rotary.original_inv_freq)


class ChainUnits:
    """All units of a chain; hidden states move between its devices by themselves."""

    has_head = True

    def __init__(self, chain: Chain) -> None:
        self._chain: Any = chain

    def new_slots(self, *, num_slots: int, capacity: int) -> Caches:
        """Return empty caches for so many sequences."""
        chain = self._chain
        if chain.fast is None or not can_share(chain.new_cache(), chain.config, capacity=capacity):
            return OwnCaches(chain.new_cache)
        shared: SlotCache = chain.new_slots(num_slots=num_slots, capacity=capacity)
        return shared

    def extend_each(self, inputs: torch.Tensor, *, slots: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Run one token id [R] of each of several sequences; returns logits [R, V]."""
        logits: torch.Tensor = self._chain.ragged(inputs.to(self._chain.device), slots=slots, cache=cache)
        return logits

    def extend(self, inputs: torch.Tensor, *, start: int, cache: Cache | None, keep: int) -> torch.Tensor:
        """Run token ids [1, S]; returns logits [1, `keep`, V]."""
        device = self._chain.device
        if start == 0:
            _begin(self._chain)
        outputs = self._chain(
            input_ids=inputs.to(device),
            position_ids=torch.arange(start, start + inputs.shape[1], device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            return_dict=True,
        )
        logits: torch.Tensor = outputs.logits
        return logits


class StageUnits:
    """The units of one stage.

    Attributes:
        stage: the stage.
        has_head: whether what comes out are logits.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.has_head = stage.spec.has_head

    def new_slots(self, *, num_slots: int, capacity: int) -> Caches:
        """Return empty caches for so many sequences."""
        stage = self.stage
        if not stage.has_layers:
            return OwnCaches(lambda: None)
        if stage.path != FAST_PATH or not can_share(stage.new_cache(), stage.model.config, capacity=capacity):
            return OwnCaches(stage.new_cache)
        return stage.new_slots(num_slots=num_slots, capacity=capacity)

    def extend_each(self, inputs: torch.Tensor, *, slots: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Run one token id [R] or hidden state [R, E] of each of several sequences; returns the same, or logits."""
        outputs = self.stage.ragged(inputs.to(self.stage.device), slots=slots, cache=cache)
        synchronize(self.stage.device)
        return outputs

    def extend(self, inputs: torch.Tensor, *, start: int, cache: Cache | None, keep: int) -> torch.Tensor:
        """Run token ids [1, S] or hidden states [1, S, E]; returns hidden states, or logits [1, `keep`, V]."""
        device = self.stage.device
        if start == 0:
            _begin(self.stage.model)
        outputs: torch.Tensor = self.stage(
            inputs.to(device),
            position_ids=torch.arange(start, start + inputs.shape[1], device=device)[None],
            cache=cache,
            logits_to_keep=keep,
        )
        synchronize(device)
        return outputs
