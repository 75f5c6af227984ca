"""A key/value cache that transformers fills during prefill and the fast path extends during decode.

Keys and values of a layer lie in buffers with spare slots; transformers sees views of the filled part. The buffers stay
where they are as long as there is room: CUDA graphs have their addresses.

Shapes: B sequences, K key/value heads, S new tokens, C slots, D head size.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

STEP_SLOTS = 256
"""Buffers grow by this many slots at a time."""


class FastLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values [B, K, C, D], of which the first `length` slots are filled.

    A drop-in for transformers' `DynamicLayer`. Layers with a sliding window keep all their slots too: masks and
    kernels leave out what is out of sight.

    Attributes:
        buffers: keys and values; empty tensors before the first use.
        length: filled slots.
    """

    def __init__(self) -> None:
        self.buffers = (torch.empty(0), torch.empty(0))
        self.length = 0
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> torch.Tensor | None:
        """The filled keys [B, K, length, D], a view."""
        return self.buffers[0][:, :, : self.length] if self.is_initialized else None

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        """transformers' constructor sets None; nothing else may: keys and values are replaced together, by `fill`."""

    @property
    def values(self) -> torch.Tensor | None:
        """The filled values [B, K, length, D], a view."""
        return self.buffers[1][:, :, : self.length] if self.is_initialized else None

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        """As for keys."""

    @property
    def capacity(self) -> int:
        """Slots that fit without growing."""
        return self.buffers[0].shape[2] if self.is_initialized else 0

    def start(self, batch: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype) -> None:
        """Become an empty cache of these sizes, unless this is one already."""
        if not self.is_initialized:
            empty = torch.empty((batch, kv_heads, 0, head_dim), dtype=dtype)
            self.lazy_initialization(empty, empty)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and sizes from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = (_buffer(key_states, 0), _buffer(value_states, 0))
        self.length = 0
        self.is_initialized = True

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` more slots."""
        needed = self.length + num_slots
        if needed > self.capacity:
            # Not by a share of the length: what is reserved in vain is memory that nobody planned for, and one copy in
            # so many steps is little beside reading all slots in each of them.
            capacity = -(-needed // STEP_SLOTS) * STEP_SLOTS
            keys, values = self.buffers
            self.buffers = (self._grown(keys, capacity), self._grown(values, capacity))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append S slots [B, K, S, D] and return views of all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        self.reserve(count)
        new = slice(self.length, self.length + count)
        self.length += count
        views = tuple(buffer[:, :, : self.length] for buffer in self.buffers)
        for view, states in zip(views, (key_states, value_states), strict=True):
            view[:, :, new] = states
        return views[0], views[1]

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace everything by `keys` and `values` [B, K, S, D]; the batch size may change."""
        if not self._has_place_for(keys):
            self.lazy_initialization(keys, values)
        self.length = 0
        self.update(keys, values)

    def get_seq_length(self) -> int:
        """Return how many slots are filled."""
        return self.length

    def reset(self) -> None:
        """Forget all slots."""
        self.is_initialized = False
        self.buffers, self.length = (torch.empty(0), torch.empty(0)), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` slots."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every sequence b continue sequence `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences at `indices`."""
        if self.keys is not None and self.values is not None:
            indices = indices.to(self.keys.device)
            self.fill(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.keys is not None and self.values is not None:
            self.fill(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def _has_place_for(self, keys: torch.Tensor) -> bool:
        kept = self.buffers[0]
        is_same_kind = (kept.dtype, kept.device) == (keys.dtype, keys.device)
        return self.is_initialized and is_same_kind and kept[:, :, : keys.shape[2]].shape == keys.shape

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = _buffer(buffer, capacity)
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


def adopt(cache: Cache, *, num_layers: int) -> bool:
    """Turn the layers of a transformers cache, in place, into ones that the kernels can extend.

    Args:
        cache: a `DynamicCache`, empty or not; whoever holds it keeps holding the right one.
        num_layers: layers of the model.

    Returns:
        Whether all layers are `FastLayer` now. False, with nothing changed, for caches of another kind (static,
        quantised, offloaded) and for sliding windows that have already dropped slots.
    """
    if len(cache.layers) == num_layers and all(isinstance(layer, FastLayer) for layer in cache.layers):
        return True
    if cache.offloading or not all(_is_whole(layer) for layer in cache.layers):
        return False
    for index, layer in enumerate(cache.layers):  # one by one: the whole cache is never there twice
        cache.layers[index] = _converted(layer)
    cache.layers.extend(FastLayer() for _ in range(num_layers - len(cache.layers)))
    cache.layer_class_to_replicate = None
    return True


def hand_back(cache: Cache, config: PreTrainedConfig) -> None:
    """Turn adopted layers, in place, into those of transformers, which drop what has left a sliding window."""
    fresh = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, FastLayer):
            if layer.keys is not None and layer.values is not None:
                fresh.update(layer.keys, layer.values, index)
            cache.layers[index] = fresh.layers[index]


def _is_whole(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        keys = layer.keys
        return not layer.record_past and (keys is None or not keys.numel() or keys.shape[2] == layer.cumulative_length)
    return type(layer) in (DynamicLayer, FastLayer)


def _converted(layer: Any) -> FastLayer:
    if isinstance(layer, FastLayer):
        return layer
    converted = FastLayer()
    if layer.is_initialized and layer.keys.numel():
        converted.fill(layer.keys, layer.values)
    return converted


def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, head_dim = like.shape
    with torch.inference_mode(mode=False):  # else the buffer could only be written in inference mode
        # Zeros: a CUDA graph reads spare slots too, with weight 0, and 0 times whatever lies there could be NaN.
        return torch.zeros((batch, heads, capacity, head_dim), dtype=like.dtype, device=like.device)
