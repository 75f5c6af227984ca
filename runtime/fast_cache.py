"""A key/value cache that transformers fills during prefill and the compiled kernels extend during decode.

Keys and values of a layer lie in buffers with spare slots; transformers sees views of the filled part.

Shapes: B sequences, K key/value heads, S new tokens, C slots, D head size.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

STEP_SLOTS = 256
"""Buffers grow by at least this many slots at a time."""


class FastLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [B, K, C, D], of which the first `length` slots are filled.

    A drop-in for transformers' `DynamicLayer`. Layers with a sliding window keep all their slots too: masks and
    kernels leave out what is out of sight.
    """

    def __init__(self) -> None:
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length = 0
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """The filled keys [B, K, length, D], a view."""
        return None if self.buffers is None else self.buffers[0][:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        assert keys is None, "the buffers are replaced together, by `fill`"

    @property
    def values(self) -> torch.Tensor | None:
        """The filled values [B, K, length, D], a view."""
        return None if self.buffers is None else self.buffers[1][:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        assert values is None, "the buffers are replaced together, by `fill`"

    @property
    def capacity(self) -> int:
        """Slots that fit without growing."""
        return 0 if self.buffers is None else self.buffers[0].shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype, device and sizes from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = (_buffer(key_states, 0), _buffer(value_states, 0))
        self.is_initialized = True

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` more slots."""
        assert self.buffers is not None
        needed = self.length + num_slots
        if needed > self.capacity:
            capacity = -(-max(needed, self.length * 5 // 4) // STEP_SLOTS) * STEP_SLOTS
            self.buffers = (self._grown(self.buffers[0], capacity), self._grown(self.buffers[1], capacity))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append S slots [B, K, S, D] and return views of all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        self.reserve(count)
        assert self.buffers is not None
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : self.length + count] = states
        self.length += count
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace everything by `keys` and `values` [B, K, S, D]; the batch size may change."""
        self.length = 0
        self.lazy_initialization(keys, values)
        self.update(keys, values)

    def get_seq_length(self) -> int:
        """Return how many slots are filled."""
        return self.length

    def reset(self) -> None:
        """Forget all slots."""
        self.buffers, self.length, self.is_initialized = None, 0, False

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
            self.fill(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.keys is not None and self.values is not None:
            self.fill(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

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
    if len(cache.layers) == num_layers and all(type(layer) is FastLayer for layer in cache.layers):
        return True
    if cache.offloading or not all(_is_whole(layer) for layer in cache.layers):
        return False
    layers = [_converted(layer) for layer in cache.layers]
    cache.layers[:] = layers + [FastLayer() for _ in range(num_layers - len(layers))]
    cache.layer_class_to_replicate = None
    return True


def _is_whole(layer: object) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return not layer.record_past and (not layer.is_initialized or layer.keys.shape[2] == layer.cumulative_length)
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
    return like.new_empty((batch, heads, capacity, head_dim))
