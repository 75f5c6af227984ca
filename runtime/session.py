"""Everything a command needs to run a model: the chain, its tokenizer, and what it may use."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase

from plans.checkpoint.folder import require_full
from plans.checkpoint.run_dtype import run_dtype
from plans.config.context import beyond_context
from plans.dtypes import DTYPE_NAMES
from plans.errors import UsageError
from plans.stages import StageRange
from runtime.generate.kept_cache import KeptCache
from runtime.generate.limits import Limits
from runtime.generate.loop import Generation, Request, generate_requests
from runtime.generate.rules import check_rules
from runtime.generate.stop_tokens import TokenStops
from runtime.generate.text import Decode
from runtime.generate.writer import OnText
from runtime.reading.capacity import check_room, memory_faults, peak_memory_bytes, stage_need
from runtime.reading.families import parse_model_config
from runtime.reading.generation_config import (
    GENERATION_CONFIG_NAME,
    end_tokens,
    generation_defaults,
    not_done,
    read_generation_config,
    score_rules,
)
from runtime.reading.generation_config import stop_strings as stated_stop_strings
from runtime.reading.opening import Source, open_source
from runtime.reading.tensors import FolderTensors, place_stages, torch_dtype
from runtime.reading.tokenizer import holds_tokenizer, load_tokenizer, missing_tokenizer
from runtime.reading.verification import Verification
from runtime.stage_time import OnStep, StageView
from runtime.stages.chain import Chain
from runtime.stages.loading import load_chain, set_speed
from runtime.stages.traffic import decode_read_bytes, read_bandwidth

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


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model.

    Attributes:
        prepared: what was known before loading.
        chain: the model.
        load_seconds: how long loading took, the comparison with checksums included.
    """

    prepared: Prepared
    chain: Chain
    load_seconds: float

    @property
    def source(self) -> Source:
        """What it was loaded from."""
        return self.prepared.source

    @property
    def dtype_name(self) -> str:
        """The dtype it computes in, as torch spells it."""
        return str(self.chain.dtype).removeprefix("torch.")

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory this process has used."""
        return peak_memory_bytes()

    def generate_requests(
        self,
        requests: Sequence[Request],
        *,
        decode: Decode | None = None,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
        cache: Any = None,
        measure_stages: bool = False,
    ) -> Generation:
        """Continue every request; as `runtime.generate.loop.generate_requests` does."""
        return generate_requests(
            self.chain,
            requests,
            decode=decode,
            on_text=on_text,
            on_step=on_step,
            should_stop=should_stop,
            cache=cache,
            measure_stages=measure_stages,
        )

    def generate_groups(
        self,
        groups: Sequence[Sequence[Request]],
        *,
        in_flight: int,
        decode: Decode | None = None,
        on_done: Callable[[int, Generation], None],
    ) -> None:
        """Continue many groups of requests, each as one batch, one after the other.

        Args:
            groups: the batches.
            in_flight: 1; one process computes one batch at a time.
            decode: token ids -> text.
            on_done: told the place of each group as it is finished.
        """
        assert in_flight == 1
        for place, group in enumerate(groups):
            on_done(place, self.generate_requests(group, decode=decode))

    def read_bandwidth(self, *, repeats: int) -> dict[str, float]:
        """Measure how fast each device reads its own weights; see `runtime.stages.traffic.read_bandwidth`."""
        return read_bandwidth(self.chain, repeats=repeats)

    def new_kept_cache(self) -> KeptCache:
        """Return a cache that can be kept from one prompt to the next."""
        return KeptCache(self.chain)

    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]:
        """Return what each stage is, and the bytes it reads in a decode step."""
        return tuple(
            StageView(stage, str(device), decode_read_bytes(self.chain, index, batch_size=batch_size))
            for index, (stage, device) in enumerate(zip(self.chain.stages, self.chain.stage_devices, strict=True))
        )


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
    if only_stage is None:
        place_stages(source.stages, device_map=device_map)
    vocab_size = source.checkpoint.config.vocab_size
    chosen_dtype, context = _choose_dtype(source, dtype), _choose_context(source, context_tokens)
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
        warnings=not_done(defaults) + _unknown_ends(unknown, vocab_size) + _shorter_context(source, context_tokens),
    )


def load_session(
    prepared: Prepared,
    *,
    cache_tokens: int | None = None,
    batch_size: int = 1,
    verifies: bool = True,
    speed: str = "reference",
    progress: Callable[[str], None] = lambda _text: None,
) -> Session:
    """Load a model onto its devices, after checking that there is room for it.

    Args:
        prepared: from `prepare_session`.
        cache_tokens: the longest any sequence will become; None for the whole context.
        batch_size: sequences that will run at once.
        verifies: compare the weights with the export's checksums, while they are loaded.
        speed: `reference`, `auto` or `max`, as in `load`.
        progress: told what is being done.

    Raises:
        MachineError: memory is short; with both numbers.
        InputError, IntegrityError: the files are not what they should be.
    """
    started = time.perf_counter()
    source = prepared.source
    tokens = min(cache_tokens or prepared.context_tokens, prepared.context_tokens)
    needs = [
        stage_need(
            source.checkpoint,
            stage,
            dtype=prepared.dtype,
            kv_cache_dtype=prepared.kv_cache_dtype,
            context_tokens=tokens,
            batch_size=batch_size,
        )
        for stage in source.stages
    ]
    check_room(needs, source.stages, place_stages(source.stages, device_map=prepared.device_map))
    progress("loading")
    with Verification(source if verifies else None) as verification, memory_faults("loading the weights"):
        # Which path is faster cannot be measured while files are being read for their checksums.
        chain = _load(source, device_map=prepared.device_map, dtype=prepared.dtype)
        chain.kv_cache_dtype = torch_dtype(prepared.kv_cache_dtype)
        verification.wait(progress)
        set_speed(chain, speed, progress=progress)
    return Session(prepared, chain, time.perf_counter() - started)


def _load(source: Source, *, device_map: Mapping[int, str], dtype: str) -> Chain:
    config = parse_model_config(source.checkpoint.config.raw)
    config.name_or_path = str(source.folder)
    return load_chain(
        config,
        source.stages,
        FolderTensors(source.checkpoint),
        dtype=dtype,
        device_map=device_map,
        generation_config=read_generation_config(require_full(source.checkpoint)),
    )


def _choose_dtype(source: Source, dtype: str | None) -> str:
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


def _shorter_context(source: Source, context_tokens: int | None) -> tuple[str, ...]:
    longest = source.checkpoint.config.longest_context_tokens
    if context_tokens is not None or source.plan is None or source.plan.workload.context_tokens <= longest:
        return ()
    planned = source.plan.workload.context_tokens
    return (f"the plan has a context of {planned} tokens, the model takes {longest}: {longest} are used",)


def load(
    path: str | Path,
    *,
    model: str | Path | None = None,
    stages: Sequence[StageRange] | None = None,
    device_map: Mapping[int, str] | None = None,
    dtype: str | None = None,
    speed: str = "reference",
) -> Chain:
    """Load an export, a plan with its checkpoint, or a plain checkpoint as a chain for use from Python.

    Args:
        path: export folder, plan file or checkpoint folder.
        model: the checkpoint, when `path` is a plan file.
        stages: another cut, in chain order; None for the plan's, or one stage of a plain checkpoint.
        device_map: zero-based stage index -> torch device, where it differs from the one the stage names.
        dtype: `fp32`, `bf16` or `fp16`; None keeps the plan's or the checkpoint's.
        speed: `reference` is transformers' code and bit-identical to the unsplit model; `max` runs the steps of
            stages on a CPU on native kernels, which round where the reference rounds but add up in another order, and
            those of stages on CUDA as recorded graphs; `auto` takes the faster of the two, by measurement. Where
            there are no kernels or graphs a warning says why.

    Returns:
        A model that works with `generate()`, streamers, pipelines and everything else in transformers.

    Raises:
        LlamaplanError: as `open_source` and `load_session`; the message says what to do.

    Example:
        >>> chain = load("shards", device_map={1: "cpu"})  # doctest: +SKIP
    """
    source = open_source(Path(path), model=None if model is None else Path(model))
    if stages is not None:
        source = replace(source, stages=tuple(stages))
    with Verification(source) as verification:
        chain = _load(source, device_map=device_map or {}, dtype=_choose_dtype(source, dtype))
        verification.wait()
        set_speed(chain, speed)
    if chain.reason is not None:
        warnings.warn(f"no fast path: {chain.reason}", stacklevel=2)
    return chain


class AnyKeptCache(Protocol):
    """A cache kept between turns; see `runtime.generate.kept_cache.KeptCache`."""

    @property
    def num_tokens(self) -> int: ...
    def reset(self) -> None: ...
    def match(self, prompt_ids: Sequence[int]) -> Any: ...
    def keep(self, token_ids: Sequence[int], cache: Any) -> None: ...


class AnySession(Protocol):
    """A loaded model; see `runtime.session.Session` and `runtime.distributed.session.ProcessSession`."""

    @property
    def prepared(self) -> Prepared: ...
    @property
    def source(self) -> Source: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def peak_memory_bytes(self) -> int: ...
    def generate_groups(
        self,
        groups: Sequence[Sequence[Request]],
        *,
        in_flight: int,
        decode: Decode | None = None,
        on_done: Callable[[int, Generation], None],
    ) -> None: ...
    def new_kept_cache(self) -> AnyKeptCache: ...
    def read_bandwidth(self, *, repeats: int) -> dict[str, float]: ...
    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]: ...
    def generate_requests(
        self,
        requests: Sequence[Request],
        *,
        decode: Decode | None = None,
        on_text: OnText | None = None,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
        cache: Any = None,
        measure_stages: bool = False,
    ) -> Generation: ...
