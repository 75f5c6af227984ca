"""Steps of a model of which some stages run on the native kernels, with transformers' own inputs and cache.

A step that the kernels can serve goes stage by stage: native stages in one call each, the others through their
transformers layers, given what the model's own forward would give them. Every other step is left to that forward, on
the same cache.

Shapes: B sequences, S new tokens, T = past + S, E hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from runtime.fast import FastStage, first_slots, layer_window
from runtime.fast_cache import STEP_SLOTS, FastLayer, adopt, hand_back
from runtime.ranges import StageRange
from runtime.speed import FAST_PATH, REFERENCE_PATH, Choice
from runtime.stage_time import StageTime


@dataclass(frozen=True, slots=True)
class Part:
    """One stage of a model.

    Attributes:
        units: what it holds; layers are counted as the model object counts them.
        native: the kernels for its units, if there are any.
        choice: for which steps they are used.
    """

    units: StageRange
    native: FastStage | None
    choice: Choice

    def threads(self, *, num_rows: int) -> int:
        """Return the threads of the kernels for a step of so many rows; 0 where transformers serves."""
        return self.choice.threads(num_rows=num_rows) if self.native is not None else 0


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every stage of a step needs, made once."""

    start: torch.Tensor  # [B] first slot that is no padding
    position_ids: torch.Tensor  # [B or 1, S]
    tables: tuple[torch.Tensor, torch.Tensor]  # cos and sin [B or 1, S, rotary_dim]
    masks: dict[bool, torch.Tensor | None]  # by "has a window"; empty when no stage needs them


class FastModel:
    """The fast steps of a whole causal language model, or of one pruned to a stage.

    Example:
        >>> fast = FastModel(model, parts)  # doctest: +SKIP
        >>> logits = fast.step(token_ids, attention_mask=mask, position_ids=positions, cache=cache)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part]) -> None:
        """Take a model and its stages in chain order; weights must not be moved or replaced from here on."""
        self._model: Any = model
        self._parts = tuple(parts)
        self._layers: tuple[Any, ...] = tuple(cast("Any", model.base_model).layers)
        self._windows = tuple(layer_window(layer, model.config) for layer in self._layers)
        # Kernels keep all slots. Some way past a window that would be a waste: then transformers takes over.
        self._max_slots = min((w + STEP_SLOTS for w in self._windows if w), default=None)

    def __deepcopy__(self, _memo: object) -> None:
        """A copy of the model has its weights elsewhere, and so runs without this."""

    def path(self, index: int, *, num_rows: int) -> str:
        """Return which path serves a plain step of so many rows in a stage."""
        return FAST_PATH if self._parts[index].threads(num_rows=num_rows) else REFERENCE_PATH

    @torch.no_grad()
    def step(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        logits_to_keep: int = 1,
        times: Sequence[StageTime] = (),
    ) -> torch.Tensor | None:
        """Run new tokens through the stages and extend the cache by them.

        Args:
            inputs: token ids [B, S], or hidden states [B, S, E] where another process has embedded them.
            attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
            position_ids: [B or 1, S]; None counts from the cache's length.
            cache: a `DynamicCache`; its layers become `FastLayer`s at the first call. None only without layers.
            logits_to_keep: how many of the last positions get logits; 0 for all.
            times: totals per stage to add to; stages that transformers computes are left to hooks.

        Returns:
            Logits [B, logits_to_keep or S, V] in the model's dtype, or hidden states [B, S, E] without a head. None,
            with no token computed, where this is nothing for the kernels: too many rows, a mask that is not plain
            left padding, or a cache of another kind.
        """
        started = time.perf_counter()
        batch, new_tokens = inputs.shape[:2]
        threads = [part.threads(num_rows=batch * new_tokens) for part in self._parts]
        start = self._ready(batch, new_tokens, attention_mask=attention_mask, cache=cache, is_native=any(threads))
        if start is None:
            return None
        if position_ids is None:
            past = int(cache.get_seq_length()) if cache is not None else 0
            position_ids = torch.arange(past, past + new_tokens, device=inputs.device)[None]
        hidden = self._embed(inputs)
        needs_masks = not all(threads)
        shared = self._share(hidden, attention_mask, position_ids, cache, start=start, needs_masks=needs_masks)
        for index, (part, count) in enumerate(zip(self._parts, threads, strict=True)):
            entered = started if index == 0 else time.perf_counter()
            if not count:
                hidden = self._reference(part, hidden, shared, cache, logits_to_keep=logits_to_keep)
                continue
            hidden = hidden.to("cpu")
            arrived = started if index == 0 else time.perf_counter()
            hidden = _native(part, hidden, shared, cache, logits_to_keep=logits_to_keep, threads=count)
            if times:
                times[index].hop_seconds += arrived - entered
                times[index].compute_seconds += time.perf_counter() - arrived
                times[index].num_fast_steps += 1
        return hidden

    def _ready(
        self,
        batch: int,
        new_tokens: int,
        *,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        is_native: bool,
    ) -> torch.Tensor | None:
        """Prepare the cache; return the first slots [B], or None if the kernels cannot serve this step."""
        if not self._layers:
            return torch.zeros(batch, dtype=torch.int64) if is_native else None
        if cache is None:
            return None
        past = int(cache.get_seq_length())
        if self._max_slots is not None and past + new_tokens > self._max_slots:
            hand_back(cache, self._model.config)
            return None
        # A prompt is read by transformers; on a cache that the kernels can extend, nothing is copied afterwards.
        if not is_native and past:
            return None
        start = first_slots(attention_mask, batch=batch)
        if start is None or (attention_mask is not None and attention_mask.shape[1] != past + new_tokens):
            return None
        return start if adopt(cache, num_layers=len(self._layers)) and is_native else None

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._parts[0].units.has_embedding:
            return inputs
        base = self._model.base_model
        hidden: torch.Tensor = base.embed_tokens(inputs)  # [B, S, E]
        multiplier = getattr(base, "embedding_multiplier", 1.0)
        return hidden if multiplier == 1.0 else hidden * multiplier

    def _share(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        *,
        start: torch.Tensor,
        needs_masks: bool,
    ) -> _Shared:
        masks: dict[bool, torch.Tensor | None] = {}
        for has_window in {bool(window) for window in self._windows} if needs_masks else ():
            make: Any = create_sliding_window_causal_mask if has_window else create_causal_mask
            masks[has_window] = make(self._model.config, hidden, attention_mask, cache, position_ids)
        cos, sin = self._model.base_model.rotary_emb(hidden, position_ids=position_ids)
        return _Shared(start, position_ids, (cos, sin), masks)

    def _reference(
        self, part: Part, hidden: torch.Tensor, shared: _Shared, cache: Cache | None, *, logits_to_keep: int
    ) -> torch.Tensor:
        """Run a stage's modules as the model's own forward runs them; hops and clocks are hooks on the modules."""
        for index in range(part.units.start_layer, part.units.end_layer):
            hidden = self._layers[index](
                hidden,
                attention_mask=shared.masks[bool(self._windows[index])],
                position_ids=shared.position_ids,
                position_embeddings=shared.tables,
                past_key_values=cache,
                use_cache=True,
            )
        if part.units.has_head:
            hidden = self._model.lm_head(self._model.base_model.norm(hidden)[:, -logits_to_keep:])
            scaling = getattr(self._model.config, "logits_scaling", 1.0)
            hidden = hidden if scaling == 1.0 else hidden / scaling
        return hidden


def _native(
    part: Part, hidden: torch.Tensor, shared: _Shared, cache: Cache | None, *, logits_to_keep: int, threads: int
) -> torch.Tensor:
    assert part.native is not None
    units = part.units
    if units.num_layers:
        assert cache is not None
        layers = cast("list[FastLayer]", cache.layers[units.start_layer : units.end_layer])
        cos, sin = (table.to("cpu") for table in shared.tables)
        hidden = part.native.decode(hidden, cos, sin, start=shared.start, cache=layers, threads=threads)
    return part.native.head(hidden[:, -logits_to_keep:], threads=threads) if units.has_head else hidden
