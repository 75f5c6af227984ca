"""The chain: all stages of a model in one process, usable wherever transformers expects a causal language model.

A chain is an instance of the checkpoint's own `XForCausalLM`. Its forward is transformers' forward, unchanged: mask
and rotary tables once per step, then the layers, which belong to stages on their devices. Split equals unsplit
because nothing is computed differently; what differs is where weights, caches and hidden states are.

With `fast` set, plain steps go to native kernels and CUDA graphs instead (`runtime.fast.model`), on the same cache.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, NoReturn, Self, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from plans.errors import UsageError
from plans.stages import StageRange, check_stages
from runtime.fast.model import FastModel, plain_step
from runtime.fast.slots import SlotCache
from runtime.reading.families import build_skeleton, check_family, family_class
from runtime.reading.weights import TensorSource, check_filled, load_units, rebuild_buffers
from runtime.stage_time import REFERENCE_PATH, StageTime
from runtime.stages.caches import new_cache
from runtime.stages.hops import Hop


class Chain(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """What a chain adds to its transformers class; made by `build_chain`, never on its own.

    `generate()` in all its modes, streamers, pipelines and evaluation harnesses work as on the unsplit model.

    Attributes:
        stages: the units of each stage, in chain order.
        stage_devices: the torch device of each stage.
        kv_cache_dtype: what `new_cache` keeps keys and values in; None for the dtype of the model.
        fast: what runs steps on native kernels and CUDA graphs; None for transformers' code alone.
        reason: why some stage has no fast path although one was wanted, for people; else None.
        stage_times: totals that fast stages add to; set by `runtime.generate.clock`.
    """

    stages: tuple[StageRange, ...] = ()
    stage_devices: tuple[torch.device, ...] = ()
    kv_cache_dtype: torch.dtype | None = None
    fast: FastModel | None = None
    reason: str | None = None
    stage_times: Sequence[StageTime] = ()

    @property
    def is_on_one_device(self) -> bool:
        """Whether hidden states never have to move."""
        return len(set(self.stage_devices)) <= 1

    def stage_modules(self, index: int) -> list[nn.Module]:
        """Return the modules of a stage in the order they run."""
        stage, base = self.stages[index], cast("Any", self.base_model)
        embedding = [base.embed_tokens] if stage.has_embedding else []
        head = [base.norm, self.lm_head] if stage.has_head else []
        return [*embedding, *base.layers[stage.start_layer : stage.end_layer], *head]

    def stage_path(self, index: int, *, num_rows: int) -> str:
        """Return which path serves a plain step of so many rows (sequences x new tokens): `fast` or `reference`."""
        return REFERENCE_PATH if self.fast is None else self.fast.path(index, num_rows=num_rows)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache; `generate(past_key_values=...)` takes it too."""
        return new_cache(self.config, dtype=self.kv_cache_dtype)

    def new_slots(self, *, num_slots: int, capacity: int) -> SlotCache:
        """Return an empty cache for `num_slots` sequences of up to `capacity` tokens each."""
        devices = [d for s, d in zip(self.stages, self.stage_devices, strict=True) for _ in range(s.num_layers)]
        dtype = self.kv_cache_dtype or self.dtype
        return SlotCache(self.config, num_slots=num_slots, capacity=capacity, dtype=dtype, devices=devices)

    @torch.no_grad()
    def ragged(self, token_ids: torch.Tensor, *, slots: Sequence[int], cache: SlotCache) -> torch.Tensor:
        """Run one token [R] of each of the sequences in `slots`; return logits [R, V] that do not depend on the others.

        A prompt, or a part of one, is read into its slot by a forward with `past_key_values=cache[slot]`.
        """
        if self.fast is not None:
            return self.fast.ragged(token_ids, slots=slots, cache=cache, times=self.stage_times)
        rows = zip(token_ids[:, None, None], slots, strict=True)
        alone = [self(row, past_key_values=cache[slot], use_cache=True, logits_to_keep=1) for row, slot in rows]
        return torch.cat([output.logits[:, -1] for output in alone])

    def generate_batch(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse continuous batching: its paged cache knows nothing of stages and would be silently wrong."""
        raise UsageError(
            "continuous batching does not work on a chain of stages",
            hint="use generate() with a left-padded batch",
            code="E-CONTINUOUS",
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    def tie_weights(self, *_args: object, **_kwargs: object) -> None:
        """Keep what loading decided: a tied head on another device has its own copy of the table."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        # Everything that moves or converts a module ends here: to(), cuda(), half(), ...
        if not self.is_on_one_device:
            raise UsageError(
                "the stages of a chain are placed one by one and cannot be moved or converted together",
                hint="load it again with another device map or dtype",
                code="E-DEVICE",
            )
        self.fast = None  # kernels and graphs hold the addresses of the weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.stage_devices = (self.device,) * len(self.stages)
        return self

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        # A graph over several devices would swallow the hops; on one device a chain compiles like any model.
        compiles: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]
        return compiles and self.is_on_one_device


def build_chain(
    config: PreTrainedConfig,
    specs: Sequence[StageRange],
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
) -> Chain:
    """Build the whole chain and load every stage onto its device.

    Args:
        config: configuration of the model; not changed.
        specs: the stages in chain order.
        tensors: lazy tensors by Hugging Face name.
        dtype: floating-point dtype of weights and computation.
        devices: one torch device per stage.

    Raises:
        InputError: the stages do not cover the model, the family is not supported, or tensors do not fit.
    """
    check_stages(specs, num_layers=config.num_hidden_layers)
    check_family(config.model_type)
    chain = build_skeleton(config, _chain_class(config.model_type))
    assert isinstance(chain, Chain)
    chain.config.dtype = dtype
    chain.stages = tuple(specs)
    chain.stage_devices = tuple(devices)
    for spec, device in zip(specs, devices, strict=True):
        load_units(chain, spec, tensors, dtype=dtype, device=device)
    rebuild_buffers(chain, dtype=dtype, device=devices[0], has_embedding=True)
    check_filled(chain)
    install_hops(chain)
    return chain


def install_hops(chain: Chain) -> None:
    """Hook the stages that do not live on the first stage's device, or get their input from another one."""
    if chain.is_on_one_device:
        return
    main = chain.stage_devices[0]
    placement: Any = {f"stage {i}": device for i, device in enumerate(chain.stage_devices)}
    chain.hf_device_map = placement
    for index, device in enumerate(chain.stage_devices):
        modules = chain.stage_modules(index)[1 if index == 0 else 0 :]
        # Shared tensors are made on the main device: there, only hidden states have to come back.
        if modules:
            Hop(device).install(modules if device != main else modules[:1])


@cache
def _chain_class(model_type: str) -> type[PreTrainedModel]:
    family = family_class(model_type)
    own = {"config_class": family.config_class, "__module__": __name__, "forward": _forward(family)}
    # The family's name is kept: transformers decides by class name what a model can be used for.
    return type(family.__name__, (Chain, family), own)


def _forward(family: type[PreTrainedModel]) -> Callable[..., Any]:
    """Return the family's forward, with steps that the fast path can serve going there."""
    reference: Callable[..., Any] = family.forward
    names = tuple(inspect.signature(reference).parameters)[1:]

    @wraps(reference)  # generate() reads the signature
    def forward(self: Chain, *args: Any, **kwargs: Any) -> Any:
        step = None if self.fast is None else plain_step(dict(zip(names, args, strict=False)) | kwargs, self.config)
        if self.fast is not None and step is not None:
            logits: Any = self.fast.step(
                step.input_ids,
                attention_mask=step.attention_mask,
                position_ids=step.position_ids,
                cache=step.cache,
                logits_to_keep=step.logits_to_keep,
                times=self.stage_times,
            )
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=step.cache)
        return reference(self, *args, **kwargs)

    return forward
