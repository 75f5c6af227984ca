"""One cache for many sequences: buffers made once, in which every sequence has a slot of its own.

To transformers a slot is the cache of one sequence: it reads a prompt into it, or takes a step. Kernels and graphs take
a step of many slots at once (`runtime.fast.model`). Nothing grows or moves, so that what is reserved is known before.

Shapes: N slots, K key/value heads, C tokens that fit into a slot, S new tokens, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from plans.stages import StageRange
from runtime.fast.cache import FastLayer
from runtime.reading.pages import give_back

Buffers = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer."""

_ROPE_OF_A_WHOLE_BATCH = ("dynamic", "longrope")


def supports_slots(config: PreTrainedConfig) -> str | None:
    """Return why sequences of different lengths cannot share a step of this model, or None if they can.

    What is refused runs with one slot.
    """
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in _ROPE_OF_A_WHOLE_BATCH:
        return f"rotary frequencies of the kind {kind} depend on the longest sequence of a step"
    return None


def is_slot(cache: Cache) -> bool:
    """Return whether a cache is a slot of a `SlotCache`, whose layers keep every token."""
    return bool(cache.layers) and isinstance(cache.layers[0], SlotLayer)


class SlotLayer(FastLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values [1, K, C, D] of one slot, of which the first `length` tokens are filled."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.buffers = (keys, values)
        self.is_initialized = True

    def reserve(self, num_slots: int) -> None:
        """Check that there is room: whoever admits a sequence has counted its tokens."""
        assert self.length + num_slots <= self.capacity, f"{self.length} + {num_slots} tokens in {self.capacity}"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, K, S, D]; return all that is filled, in the dtype of what was given."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def reset(self) -> None:
        """Forget all tokens; the buffers are the cache's."""
        self.length = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Where a stage finds the R sequences of a step.

    Attributes:
        cache: holds them.
        slots: one for each of them.
        lengths: how many tokens each of them has before the step.
        units: the stage.
    """

    cache: "SlotCache"
    slots: Sequence[int]
    lengths: Sequence[int]
    units: StageRange

    @property
    def buffers(self) -> tuple[Buffers, ...]:
        """Keys and values of the stage's layers."""
        return self.cache.buffers[self.units.start_layer : self.units.end_layer]

    def extend(self) -> None:
        """Count one more token of each sequence in the stage's layers: a step has written it."""
        for slot in self.slots:
            layers: list[Any] = self.cache[slot].layers
            for layer in layers[self.units.start_layer : self.units.end_layer]:
                layer.length += 1


class SlotCache:
    """Keys and values of many sequences.

    Attributes:
        num_slots: N.
        capacity: C.
        buffers: by layer, [N, K, C, D] each.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=4, head_dim=8)
        >>> cache = SlotCache(config, num_slots=3, capacity=16, dtype=torch.float32, devices=[torch.device("cpu")] * 2)
        >>> cache.buffers[1][0].shape, cache.length(2)
        (torch.Size([3, 4, 16, 8]), 0)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_slots: int,
        capacity: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
    ) -> None:
        """Reserve the memory.

        Args:
            config: of the model, or of the part of it that a stage holds.
            num_slots: sequences at a time.
            capacity: tokens of a sequence at most.
            dtype: what keys and values are kept in; kernels and graphs need the model's own.
            devices: where each layer lives.
        """
        self.num_slots, self.capacity = num_slots, capacity
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_slots, config.num_key_value_heads, capacity, head_dim)
        with torch.inference_mode(mode=False):  # else the buffers could only be written in inference mode
            self.buffers: tuple[Buffers, ...] = tuple(
                (_buffer(shape, dtype, device), _buffer(shape, dtype, device)) for device in devices
            )
            self._sequences = tuple(self._view(slot) for slot in range(num_slots))

    def __getitem__(self, slot: int) -> DynamicCache:
        """Return a slot as the cache of one sequence; always the same object, extended in place."""
        return self._sequences[slot]

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return int(self._sequences[slot].get_seq_length())

    def keep(self, slot: int, *, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of a slot, in every layer, however far each of them came."""
        for layer in self._sequences[slot].layers:
            cast("SlotLayer", layer).length = min(cast("SlotLayer", layer).length, num_tokens)

    def release(self, slot: int) -> None:
        """Forget all tokens of a slot; on a CPU their memory goes back, too."""
        self.keep(slot, num_tokens=0)
        for buffer in (buffer for pair in self.buffers for buffer in pair if buffer.device.type == "cpu"):
            give_back(buffer[slot].data_ptr(), buffer[slot].nbytes)

    def _view(self, slot: int) -> DynamicCache:
        part = slice(slot, slot + 1)
        cache = DynamicCache()
        cache.layers = [SlotLayer(keys[part], values[part]) for keys, values in self.buffers]
        cache.layer_class_to_replicate = None
        return cache


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # On a CPU nothing reads spare room, and memory is taken when it is first written; a graph reads it with weight 0.
    make = torch.empty if device.type == "cpu" else torch.zeros
    return make(shape, dtype=dtype, device=device)
