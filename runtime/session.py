"""Everything a command needs to run a model: the chain, its tokenizer, and what it may use."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from plans.checkpoint.units import require_full
from plans.stages import StageRange
from runtime.generate.clock import ChainWatch, watch_chain
from runtime.prepared import Prepared, choose_dtype
from runtime.reading.capacity import check_room, memory_faults, peak_memory_bytes, stage_need
from runtime.reading.families import parse_model_config
from runtime.reading.generation_config import read_generation_config
from runtime.reading.opening import Source, open_source
from runtime.reading.tensors import FolderTensors, place_stages, torch_dtype
from runtime.reading.verification import Verification
from runtime.stage_time import StageView, StageWatch
from runtime.stages.chain import Chain
from runtime.stages.loading import load_chain, set_speed
from runtime.stages.traffic import decode_read_bytes, read_bandwidth
from runtime.steps.local import LocalSteps
from runtime.steps.parts import Steps


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

    def new_steps(self) -> LocalSteps:
        """Return what computes the steps of an engine."""
        return LocalSteps(self.chain)

    def watch_stages(self) -> AbstractContextManager[ChainWatch]:
        """Measure what the stages do inside the block."""
        return watch_chain(self.chain)

    def read_bandwidth(self, *, repeats: int) -> dict[str, float]:
        """Measure how fast each device reads its own weights; see `runtime.stages.traffic.read_bandwidth`."""
        return read_bandwidth(self.chain, repeats=repeats)

    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]:
        """Return what each stage is, and the bytes it reads in a decode step."""
        return tuple(
            StageView(stage, str(device), decode_read_bytes(self.chain, index, batch_size=batch_size))
            for index, (stage, device) in enumerate(zip(self.chain.stages, self.chain.stage_devices, strict=True))
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
            those of stages on CUDA as recorded graphs; `auto` reads prompts layer by layer and measures the rest. Where
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
        chain = _load(source, device_map=device_map or {}, dtype=choose_dtype(source, dtype))
        verification.wait()
        set_speed(chain, speed)
    if chain.reason is not None:
        warnings.warn(f"no fast path: {chain.reason}", stacklevel=2)
    return chain


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
    def new_steps(self) -> Steps: ...
    def watch_stages(self) -> AbstractContextManager[StageWatch]: ...
    def read_bandwidth(self, *, repeats: int) -> dict[str, float]: ...
    def stage_views(self, *, batch_size: int) -> tuple[StageView, ...]: ...
