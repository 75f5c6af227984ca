"""The CUDA fast path: a step of one token per sequence through a stage, recorded once as a graph and replayed.

What is recorded are transformers' own layers, on inputs and caches whose addresses stay the same
(`runtime.fast.cache`). Everything that changes from step to step lies on the device, the places of the new tokens too,
so that a step queues a few copies and one replay, and never waits. A recording belongs to one cache; larger buffers
need a new one. A step of some slots of a shared cache (`runtime.fast.slots`) computes all of them and writes only to
those: so a sequence gets the same numbers whatever its neighbours do.

Shapes: B sequences, E hidden size, K key/value heads, C slots, D head size, V vocabulary, T tokens so far.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from runtime.fast.cache import FastLayer
from runtime.fast.kernels import FAMILIES, layer_window
from runtime.fast.slots import Buffers, Places

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """How work on a device is recorded."""

    def run(self, work: Work) -> torch.Tensor:
        """Do the work without recording, as it has to be done once before."""

    def record(self, work: Work) -> Work:
        """Return what does the work again, on what then lies in the same memory, and gives a tensor of its own.

        Raises:
            RuntimeError: it cannot be recorded; the device is as it was before.
        """


class CudaRecorder:
    """Records CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        # Of its own: the stream that torch takes by itself belongs to the first device that ever recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Work) -> torch.Tensor:
        """Do the work on the stream of the recordings, in order with the current one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = work()
        current.wait_stream(self._stream)
        output.record_stream(current)
        return output

    def record(self, work: Work) -> Work:
        """Capture the work. Other threads may use the device meanwhile."""
        device, graph = self._stream.device, torch.cuda.CUDAGraph()
        # The outer context selects the device, and restores the stream when a capture that failed does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = work()

        def replay() -> torch.Tensor:
            with torch.cuda.device(device):
                graph.replay()
                return output.clone()  # the next replay writes to the same place

        return replay


_MASKED_ATTENTION = ("eager", "sdpa")


def supports_graphs(config: PreTrainedConfig) -> str | None:
    """Return why steps of models of this configuration cannot be recorded, or None if they can."""
    if config.model_type not in FAMILIES:
        return f"no CUDA graph is made for {config.model_type}"
    if config._attn_implementation not in _MASKED_ATTENTION:
        return f"attention of the kind {config._attn_implementation} cannot be recorded"
    return None


@dataclass(slots=True)
class _Inputs:
    """What a step reads, always at the same addresses."""

    hidden: torch.Tensor  # [B, 1, E]
    cos: torch.Tensor  # [B, 1, rotary_dim]
    sin: torch.Tensor
    slots: torch.Tensor  # [C], 0, 1, 2, ...
    is_token: torch.Tensor  # [B, C] bool; beyond the new token it may hold anything
    slot: torch.Tensor  # [B, 1] int64, where the new token goes
    is_new: torch.Tensor  # [B, 1] bool, which sequences get one

    def put(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        slot: int,
    ) -> None:
        """Bring a step's inputs here, from whatever device, without waiting for them."""
        self.hidden.copy_(hidden, non_blocking=True)
        self.cos.copy_(cos, non_blocking=True)
        self.sin.copy_(sin, non_blocking=True)
        self.slot.fill_(slot)
        self.is_new.fill_(True)  # noqa: FBT003
        if attention_mask is None:
            self.is_token.fill_(True)  # noqa: FBT003
        else:
            self.is_token[:, : attention_mask.shape[1]].copy_(attention_mask, non_blocking=True)

    def scatter(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rows: torch.Tensor, slot: torch.Tensor
    ) -> None:
        """Bring the inputs of some sequences here; `rows` [R] says of which, `slot` [R] where their tokens go."""
        for ours, given in ((self.hidden, hidden), (self.cos, cos), (self.sin, sin), (self.slot, slot[:, None])):
            ours.index_copy_(0, rows, given.to(ours.device, non_blocking=True))
        self.is_token.fill_(True)  # noqa: FBT003
        self.is_new.fill_(False).index_fill_(0, rows, True)  # noqa: FBT003

    def mask(self, *, window: int) -> torch.Tensor:
        """Return what to add to attention scores [B, 1, 1, C]: minus infinity where there is nothing to see."""
        is_seen = self.is_token & (self.slots <= self.slot)
        if window:
            is_seen &= self.slots > self.slot - window
        is_seen |= self.slots == self.slot  # even padding sees something: no row is without a number
        scores = torch.zeros_like(is_seen, dtype=self.hidden.dtype)
        return scores.masked_fill_(~is_seen, -torch.inf)[:, None, None]


@dataclass(slots=True)
class _Recording:
    """What holds for one cache while its buffers stay where they are."""

    inputs: _Inputs
    known: list[weakref.ref[torch.Tensor]]  # weak: an old cache is free to go
    has_run: bool = False
    replay: Work | None = None

    def fits(self, batch: int, buffers: Sequence[Buffers]) -> bool:
        """Return whether batch and buffers are still those it was made for."""
        is_same = all(known() is keys for known, (keys, _) in zip(self.known, buffers, strict=True))
        return is_same and len(self.inputs.hidden) == batch


@dataclass(frozen=True, slots=True)
class _Slots:
    """One layer's buffers as the cache that its attention extends by one token and reads."""

    keys: torch.Tensor  # [B, K, C, D]
    values: torch.Tensor
    inputs: _Inputs

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, K, 1, D] at the slots and return all slots: the mask leaves out what is not filled."""
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _put(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        place = self.inputs.slot[:, :, None, None].expand(-1, buffer.shape[1], 1, buffer.shape[3])  # [B, K, 1, D]
        kept = buffer.gather(2, place)  # of a sequence that gets no token
        return buffer.scatter_(2, place, torch.where(self.inputs.is_new[:, :, None, None], states, kept))


class GraphStage:
    """Decoder layers, and where the stage has it the head, as recorded steps of one token per sequence.

    Attributes:
        device: where the weights are.
        failure: why nothing can be recorded any more; None while all is well.

    Example:
        >>> stage = GraphStage(model.model.layers, model.config, recorder=CudaRecorder(device))  # doctest: +SKIP
        >>> hidden = stage.step(hidden, cos, sin, attention_mask=mask, cache=cache.layers)  # doctest: +SKIP
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        config: PreTrainedConfig,
        *,
        recorder: Recorder,
        norm: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        """Take the modules; weights must not be moved or replaced from here on.

        Args:
            layers: transformers decoder layers; may be empty where there is a head.
            config: their configuration; `supports_graphs(config)` must be None.
            recorder: records work on the device where the weights are.
            norm: the final norm, if the stage has the head.
            head: the `lm_head`, if the stage has it.
        """
        self._layers: tuple[Any, ...] = tuple(layers)
        self._windows = tuple(layer_window(layer, config) for layer in layers)
        self._norm: Any = norm
        self._head: Any = head
        self._logits_scaling = float(getattr(config, "logits_scaling", 1.0))
        self._recorder = recorder
        self._lock = threading.Lock()
        # By what owns the buffers.
        self._recordings: weakref.WeakKeyDictionary[object, _Recording] = weakref.WeakKeyDictionary()
        self._no_cache = FastLayer()  # the key where the stage has no layers and no slots
        self.device: torch.device = next(p.device for m in (*layers, head) if m is not None for p in m.parameters())
        self.failure: str | None = None

    @torch.no_grad()
    def step(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        cache: Sequence[FastLayer],
    ) -> torch.Tensor:
        """Run one new token of every sequence through the stage and extend the cache by it.

        The first step on new buffers runs the layers as they are, the second one is recorded, and so are all others
        then: so nothing is computed only to warm up.

        Args:
            hidden: [B, 1, E] on any device.
            cos: rotary table [B or 1, 1, rotary_dim] for the tokens' positions, as the model's `rotary_emb` makes it.
            sin: like `cos`.
            attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
            cache: one layer per decoder layer, all filled to the same length, at least 1.

        Returns:
            Hidden states [B, 1, E], or logits [B, 1, V] from a stage with the head.
        """
        with self._lock:
            for layer in cache:
                layer.reserve(1)
            slot = cache[0].length if cache else 0
            buffers = [layer.buffers for layer in cache]
            recording = self._recording(hidden, cos, buffers, key=cache[0] if cache else self._no_cache)
            mask = attention_mask if cache else None
            recording.inputs.put(hidden, cos, sin, attention_mask=mask, slot=slot)
            output = self._run(recording, buffers)
        for layer in cache:
            layer.length += 1
        return output

    @torch.no_grad()
    def ragged(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        places: Places,
    ) -> torch.Tensor:
        """Run one new token of each of R sequences through the stage and write its keys and values.

        Args:
            hidden: [R, 1, E] on any device.
            cos: rotary table [R, 1, rotary_dim] for the tokens' positions.
            sin: like `cos`.
            places: where the sequences are in a cache of N slots.

        Returns:
            Hidden states [R, 1, E], or logits [R, 1, V] from a stage with the head.
        """
        numbers = (torch.tensor(given) for given in (places.slots, places.lengths))
        rows, slot = (given.to(self.device, non_blocking=True) for given in numbers)
        buffers = places.buffers
        with self._lock:
            like = hidden[:1].expand(places.cache.num_slots, -1, -1)
            recording = self._recording(like, cos, buffers, key=places.cache)
            recording.inputs.scatter(hidden, cos, sin, rows=rows, slot=slot)
            return self._run(recording, buffers).index_select(0, rows)

    def _recording(
        self, hidden: torch.Tensor, cos: torch.Tensor, buffers: Sequence[Buffers], *, key: object
    ) -> _Recording:
        """Return what was recorded for these buffers, or a place to record."""
        recording = self._recordings.get(key)
        if recording is None or not recording.fits(len(hidden), buffers):
            known = [weakref.ref(keys) for keys, _ in buffers]
            inputs = self._inputs(hidden, cos, capacity=buffers[0][0].shape[2] if buffers else 1)
            self._recordings[key] = recording = _Recording(inputs, known)
        return recording

    def _inputs(self, hidden: torch.Tensor, cos: torch.Tensor, *, capacity: int) -> _Inputs:
        batch, device = len(hidden), self.device
        with torch.inference_mode(mode=False):  # else they could only be written in inference mode
            return _Inputs(
                hidden=torch.zeros(hidden.shape, dtype=hidden.dtype, device=device),
                cos=torch.zeros((batch, 1, cos.shape[-1]), dtype=cos.dtype, device=device),
                sin=torch.zeros((batch, 1, cos.shape[-1]), dtype=cos.dtype, device=device),
                slots=torch.arange(capacity, device=device),
                is_token=torch.zeros((batch, capacity), dtype=torch.bool, device=device),
                slot=torch.zeros((batch, 1), dtype=torch.int64, device=device),
                is_new=torch.zeros((batch, 1), dtype=torch.bool, device=device),
            )

    def _run(self, recording: _Recording, buffers: Sequence[Buffers]) -> torch.Tensor:
        work = partial(self._work, recording.inputs, buffers)
        if recording.replay is None and recording.has_run and self.failure is None:
            try:
                recording.replay = self._recorder.record(work)
            except RuntimeError as error:  # out of memory, or a driver that cannot
                self.failure = f"no CUDA graph can be recorded on {self.device}: {error}"
                warnings.warn(f"reference path from here on: {self.failure}", stacklevel=2)
        recording.has_run = True
        return self._recorder.run(work) if recording.replay is None else recording.replay()

    def _work(self, inputs: _Inputs, buffers: Sequence[Buffers]) -> torch.Tensor:
        """Compute a step from what lies in the inputs; nothing here may depend on anything else that changes."""
        masks = {window: inputs.mask(window=window) for window in set(self._windows)}
        hidden = inputs.hidden
        for layer, window, (keys, values) in zip(self._layers, self._windows, buffers, strict=True):
            # forward(), not a call: hooks would move tensors, or wait to read the clock.
            hidden = layer.forward(
                hidden,
                attention_mask=masks[window],
                position_embeddings=(inputs.cos, inputs.sin),
                past_key_values=_Slots(keys, values, inputs),
                use_cache=True,
            )
        if self._head is None:
            return hidden
        logits: torch.Tensor = self._head.forward(self._norm.forward(hidden))
        return logits if self._logits_scaling == 1.0 else logits / self._logits_scaling
