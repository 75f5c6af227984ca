"""A model before its weights are loaded: everything else is read, chosen and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from plans.checkpoint.run_dtype import run_dtype
from plans.checkpoint.units import require_full
from plans.config.context import beyond_context
from plans.dtypes import DTYPE_NAMES
from plans.errors import UsageError
from plans.packed.config import Packing
from runtime.generate.limits import Limits
from runtime.generate.rules import check_rules
from runtime.generate.stop_tokens import TokenStops
from runtime.generate.text import Decode
from runtime.reading.capacity import kv_cache_bytes
from runtime.reading.families import parse_model_config
from runtime.reading.generation_config import (
    GENERATION_CONFIG_NAME,
    end_tokens,
    generation_defaults,
    not_done,
    score_rules,
)
from runtime.reading.generation_config import stop_strings as stated_stop_strings
from runtime.reading.opening import Source
from runtime.reading.tensors import place_stages
from runtime.reading.tokenizer import holds_tokenizer, load_tokenizer, missing_tokenizer

DEFAULT_PREFILL_CHUNK_TOKENS = 2048
"""Longer prompts are read in pieces: what a step needs beside weights and cache then stops growing with the prompt."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model before its weights are loaded: prompts can be read and refused without waiting for them.

    Attributes:
        source: what it will be loaded from.
        device_map: zero-based stage index -> device, where it differs from the plan's.
        dtype: `fp32`, `bf16` or `fp16`.
        kv_cache_dtype: what keys and values are kept in.
        own_tokenizer: its tokenizer; None where it has none and the command needs token ids only.
        generation_config: the checkpoint's defaults.
        context_tokens: prompt and new tokens together may not exceed this.
        eos_token_ids: tokens that end a sequence.
        token_stops: finds the checkpoint's stop strings, if it has some.
        warnings: remarks for a person.
    """

    source: Source
    device_map: Mapping[int, str]
    dtype: str
    kv_cache_dtype: str
    own_tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig
    context_tokens: int
    eos_token_ids: frozenset[int]
    token_stops: TokenStops | None = None
    warnings: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            InputError: it has none.
        """
        if self.own_tokenizer is None:
            raise missing_tokenizer(self.source.folder)
        return self.own_tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; every token id is below it."""
        return self.source.checkpoint.config.vocab_size

    @property
    def own_decode(self) -> Decode | None:
        """Token ids -> text, if it has a tokenizer."""
        return None if self.own_tokenizer is None else self.decode

    def cache_bytes(self, num_tokens: int) -> tuple[int, ...]:
        """Return the bytes of a cache of so many tokens, per stage."""
        config, stages = self.source.checkpoint.config, self.source.stages
        return tuple(
            kv_cache_bytes(config, stage, kv_cache_dtype=self.kv_cache_dtype, context_tokens=num_tokens)
            for stage in stages
        )

    @property
    def prefill_chunk_tokens(self) -> int:
        """Prompt tokens per step: what the plan counted on if it reads prompts in pieces, else a bound for memory."""
        workload = None if self.source.plan is None else self.source.plan.workload
        if workload is not None and workload.prefill_chunk_tokens < workload.prompt_tokens:
            return workload.prefill_chunk_tokens
        return DEFAULT_PREFILL_CHUNK_TOKENS

    def limits(
        self,
        *,
        max_tokens: int | None,
        stop_strings: tuple[str, ...] = (),
        prefill_chunk_tokens: int | None = None,
        ignores_eos: bool = False,
    ) -> Limits:
        """Return where a sequence ends: where it was asked to, else where the checkpoint says."""
        asked = self.generation_config
        stated = () if stop_strings else stated_stop_strings(asked)
        return Limits(
            context_tokens=self.context_tokens,
            max_tokens=max_tokens,
            default_max_tokens=asked.max_new_tokens,
            max_length=asked.max_length,
            eos_token_ids=frozenset() if ignores_eos else self.eos_token_ids,
            stop_strings=stop_strings or stated,
            is_stop=self.token_stops if stated else None,
            prefill_chunk_tokens=prefill_chunk_tokens or self.prefill_chunk_tokens,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def prepare_session(
    source: Source,
    *,
    device_map: Mapping[int, str],
    dtype: str | None = None,
    kv_cache_dtype: str | None = None,
    context_tokens: int | None = None,
    only_stage: int | None = None,
    needs_text: bool = True,
) -> Prepared:
    """Read everything but the weights.

    Args:
        source: from `open_source`.
        device_map: zero-based stage index -> device, where it differs from the plan's.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the plan's or the checkpoint's.
        kv_cache_dtype: the same for keys and values; None takes the plan's where `dtype` is the plan's too,
            else `dtype`.
        context_tokens: None takes the plan's context, else the model's.
        only_stage: the stage that will run on this machine; None for all of them.
        needs_text: whether a tokenizer must be there; without, token ids are enough.

    Raises:
        UsageError: a context longer than the model's, or a dtype that is not known.
        MachineError: a device is missing.
        InputError: the files are not what they should be.
    """
    devices = place_stages(source.stages, device_map=device_map) if only_stage is None else ()
    vocab_size = source.checkpoint.config.vocab_size
    chosen_dtype, context = choose_dtype(source, dtype), _choose_context(source, context_tokens)
    raw = source.checkpoint.config.raw
    model_config = parse_model_config(raw)
    has_tokenizer = needs_text or holds_tokenizer(source.folder)
    tokenizer = load_tokenizer(source.folder, vocab_size=vocab_size) if has_tokenizer else None
    defaults = generation_defaults(require_full(source.checkpoint), model_config, raw=raw)
    ends, unknown = end_tokens(defaults, default=getattr(tokenizer, "eos_token_id", None), vocab_size=vocab_size)
    stops = stated_stop_strings(defaults)
    check_rules(score_rules(defaults), vocab_size=vocab_size, eos_token_ids=ends, where=GENERATION_CONFIG_NAME)
    return Prepared(
        source=source,
        device_map=device_map,
        dtype=chosen_dtype,
        kv_cache_dtype=_choose_kv_dtype(source, kv_cache_dtype, dtype=chosen_dtype),
        own_tokenizer=tokenizer,
        generation_config=defaults,
        context_tokens=context,
        eos_token_ids=ends,
        token_stops=TokenStops(tokenizer, stops, where=GENERATION_CONFIG_NAME) if stops and tokenizer else None,
        warnings=(
            not_done(defaults)
            + _unknown_ends(unknown, vocab_size)
            + _shorter_context(source, context_tokens)
            + unpacking_remarks(source.checkpoint.config.packing, devices)
        ),
    )


def choose_dtype(source: Source, dtype: str | None) -> str:
    if dtype is None:
        return source.dtype or run_dtype(source.checkpoint)
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"'{dtype}' is not a dtype", where="--dtype", expected="fp32, bf16 or fp16")
    return DTYPE_NAMES[dtype]


def _choose_kv_dtype(source: Source, kv_cache_dtype: str | None, *, dtype: str) -> str:
    workload = None if source.plan is None else source.plan.workload
    if kv_cache_dtype is None:
        return workload.kv_cache_dtype if workload is not None and workload.dtype == dtype else dtype
    return DTYPE_NAMES[kv_cache_dtype]


def _choose_context(source: Source, context_tokens: int | None) -> int:
    config = source.checkpoint.config
    longest, trained = config.longest_context_tokens, config.max_position_embeddings
    if context_tokens is None:
        return min(source.plan.workload.context_tokens, longest) if source.plan else trained
    if context_tokens > longest:
        what = beyond_context(context_tokens, longest=longest, trained=trained)
        raise UsageError(what, where="--ctx-size", expected=f"1 to {longest}")
    return context_tokens


def _unknown_ends(token_ids: Sequence[int], vocab_size: int) -> tuple[str, ...]:
    ids = ", ".join(map(str, token_ids))
    return (f"eos_token_id {ids} is outside the vocabulary (0 to {vocab_size - 1}) and ends nothing",) if ids else ()


def unpacking_remarks(packing: Packing | None, devices: Sequence[torch.device]) -> tuple[str, ...]:
    """Return what a person should know of packed weights on these devices: there are kernels for CPUs alone."""
    places = sorted({str(device) for device in devices if device.type != "cpu"})
    if packing is None or not places:
        return ()
    slow = f"{packing.words} weights are unpacked at every step on {', '.join(places)}, which is slow"
    return (f"{slow}; 'llamaplan emit PLAN --for vllm' writes the start of an engine that has kernels for them",)


def _shorter_context(source: Source, context_tokens: int | None) -> tuple[str, ...]:
    longest = source.checkpoint.config.longest_context_tokens
    if context_tokens is not None or source.plan is None or source.plan.workload.context_tokens <= longest:
        return ()
    planned = source.plan.workload.context_tokens
    return (f"the plan has a context of {planned} tokens, the model takes {longest}: {longest} are used",)
