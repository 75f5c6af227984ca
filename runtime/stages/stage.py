"""One stage: a contiguous run of units, computed by the checkpoint's own transformers class.

A stage stands alone: it holds only its weights, numbers its layers from 0, and owns a cache with exactly those
layers, so it can live in a process of its own. (Within one process `runtime.stages.chain` runs them as one model.)

Shapes: B sequences, S new tokens, T = past + S, E hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from plans.native.building import Unavailable
from plans.stages import StageRange
from runtime.fast.cache import adopt
from runtime.fast.model import FastModel
from runtime.fast.setup import set_up
from runtime.fast.slots import SlotCache
from runtime.fast.speed import Speed, parse_speed
from runtime.reading.families import PER_LAYER_KEYS, build_skeleton, check_family, family_class
from runtime.reading.weights import TensorSource, check_filled, load_units, rebuild_buffers
from runtime.stage_time import FAST_PATH, REFERENCE_PATH
from runtime.stages.caches import new_cache

__all__ = ["Stage", "StageRange", "build_stage"]


class Stage(nn.Module):
    """A pruned `XForCausalLM`; calling it runs the stage's units.

    Attributes:
        spec: which units it holds.
        model: the transformers model with everything else replaced by identity.
        device: where its weights and its cache live.
        kv_cache_dtype: what `new_cache` keeps keys and values in; None for the dtype of the weights.
        reason: why there is no fast path although one was wanted, for people; else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: StageRange,
        *,
        device: torch.device,
        kv_cache_dtype: torch.dtype | None = None,
        fast: FastModel | Unavailable | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.device = device
        self.kv_cache_dtype = kv_cache_dtype
        self._fast = fast if isinstance(fast, FastModel) else None
        self.reason = fast.reason if fast is not None else None

    @property
    def has_layers(self) -> bool:
        """Whether the stage holds any decoder layer (the embedding or the head can be alone)."""
        return self.spec.num_layers > 0

    @property
    def path(self) -> str:
        """`fast` if steps run on native kernels or CUDA graphs where they qualify, else `reference`."""
        return REFERENCE_PATH if self._fast is None else FAST_PATH

    def new_cache(self) -> Cache:
        """Return an empty cache for this stage's layers, numbered from 0, that its path can extend."""
        cache = new_cache(self.model.config, dtype=self.kv_cache_dtype)
        if self._fast is not None:
            adopt(cache, num_layers=len(cast("Any", self.model.base_model).layers))
        return cache

    def new_slots(self, *, num_slots: int, capacity: int) -> SlotCache:
        """Return an empty cache of this stage's layers for `num_slots` sequences of up to `capacity` tokens each."""
        config: PreTrainedConfig = self.model.config
        dtype = self.kv_cache_dtype or cast("torch.dtype", config.dtype)
        devices = [self.device] * self.spec.num_layers
        return SlotCache(config, num_slots=num_slots, capacity=capacity, dtype=dtype, devices=devices)

    @torch.no_grad()
    def ragged(self, inputs: torch.Tensor, *, slots: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Run one new token of each of the sequences in `slots`, whatever their lengths.

        Args:
            inputs: token ids [R] for the stage with the embedding, hidden states [R, E] for the others.
            slots: where each sequence is in the cache, which is extended.
            cache: this stage's own, by `new_slots`; `cache[slot]` takes a prompt by `forward`.

        Returns:
            Logits [R, V] from the stage with the head, hidden states [R, E] from others.
        """
        if self._fast is not None:
            return self._fast.ragged(inputs, slots=slots, cache=cache)
        rows = zip(inputs[:, None, None], slots, strict=True)
        return torch.cat([self(row, cache=cache[slot], logits_to_keep=1)[:, -1] for row, slot in rows])

    def forward(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        """Run the units.

        Args:
            inputs: token ids [B, S] for the stage with the embedding, hidden states [B, S, E] for the others.
            attention_mask: [B, T] with 0 for padding, or None when nothing is padded.
            position_ids: [B, S] or [1, S]; None counts from the cache's length.
            cache: this stage's own cache, extended by S tokens; None to compute without one.
            logits_to_keep: with the head, how many of the last positions get logits; 0 for all.

        Returns:
            Logits [B, S or logits_to_keep, V] from the stage with the head, hidden states [B, S, E] from others.
        """
        if self._fast is not None and not torch.is_grad_enabled():
            found = self._fast.step(
                inputs,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                logits_to_keep=logits_to_keep,
            )
            if found is not None:
                return found
        name = "input_ids" if self.spec.has_embedding else "inputs_embeds"
        arguments: dict[str, Any] = {name: inputs, "use_cache": False}
        if self.has_layers:
            arguments |= {
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "past_key_values": cache,
                "use_cache": cache is not None,
            }
        if self.spec.has_head:
            logits: torch.Tensor = self.model(**arguments, logits_to_keep=logits_to_keep).logits
            return logits
        hidden: torch.Tensor = self.model.base_model(**arguments).last_hidden_state
        return hidden


def build_stage(
    config: PreTrainedConfig,
    spec: StageRange,
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_dtype: torch.dtype | None = None,
    speed: str = "reference",
    progress: Callable[[str], None] | None = None,
) -> Stage:
    """Build a stage and load its weights, and only those.

    Args:
        config: configuration of the whole model; not changed.
        spec: which units to hold.
        tensors: lazy tensors by Hugging Face name, of the whole checkpoint or of this stage's bundle.
        dtype: floating-point dtype of weights and computation.
        device: where the stage lives; on a CPU, tensors already of `dtype` stay mapped.
        kv_cache_dtype: what `Stage.new_cache` keeps keys and values in; None for `dtype`. Another one has no kernels.
        speed: `reference`, `auto` (the faster path, by measurement) or `max` (native kernels and CUDA graphs wherever
            possible); says what `Stage.path` becomes. Where these were wanted and cannot be, `Stage.reason` says why.
        progress: told, in a few words, what takes time: compiling and measuring, once per machine.

    Raises:
        InputError: the family is not supported, or tensors are missing, unknown or of a wrong shape.
        UsageError: `speed` is none of the three.
    """
    wanted = parse_speed(speed if kv_cache_dtype in (None, dtype) else Speed.REFERENCE)
    check_family(config.model_type)
    model = build_skeleton(config, family_class(config.model_type))
    model.config.dtype = dtype
    load_units(model, spec, tensors, dtype=dtype, device=device)
    rebuild_buffers(model, dtype=dtype, device=device, has_embedding=spec.has_embedding)
    _prune(model, spec)
    _number_layers_locally(model, spec)
    check_filled(model)
    local = replace(spec, start_layer=0, end_layer=spec.num_layers)
    fast = set_up(model, [local], [device], speed=wanted, progress=progress)
    return Stage(model, spec, device=device, kv_cache_dtype=kv_cache_dtype, fast=fast).eval()


def _prune(model: PreTrainedModel, spec: StageRange) -> None:
    base: Any = model.base_model
    base.layers = base.layers[spec.start_layer : spec.end_layer]
    if not spec.has_embedding:
        base.embed_tokens = nn.Identity()
        if hasattr(base, "embedding_multiplier"):
            # Granite scales whatever enters its first layer; only the stage that embeds may do so.
            base.embedding_multiplier = 1.0
    if not spec.has_head:
        base.norm = nn.Identity()
        model.lm_head = nn.Identity()


def _number_layers_locally(model: PreTrainedModel, spec: StageRange) -> None:
    """Count layers from 0: masks are sized from the first full-attention layer of the stage's own cache."""
    base: Any = model.base_model
    for module in base.layers.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx -= spec.start_layer
    local = slice(spec.start_layer, spec.end_layer)
    model.config.num_hidden_layers = spec.num_layers
    for key in PER_LAYER_KEYS:
        if getattr(model.config, key, None) is not None:
            setattr(model.config, key, copy.copy(getattr(model.config, key)[local]))
