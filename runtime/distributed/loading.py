"""Load one stage in its own process: its bundle, and nothing else."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from runtime.reading.capacity import check_room, memory_faults, stage_need
from runtime.reading.devices import torch_device
from runtime.reading.families import parse_model_config
from runtime.reading.opening import Source
from runtime.reading.tensors import FolderTensors, torch_dtype
from runtime.reading.verification import Verification
from runtime.stages.stage import Stage, build_stage

SWITCH_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A stage and what loading it took.

    Attributes:
        hidden_size: width of the states that enter and leave it.
    """

    stage: Stage
    number: int
    hidden_size: int
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a stage is loaded.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`.
        kv_cache_dtype: the same, of keys and values.
        device: where to, if not where the plan says.
        verifies: compare the weights with the export's checksums.
        cache_tokens: the longest any sequence will become.
        batch_size: sequences whose caches are kept at once.
        speed: `reference`, `auto` or `max`, as in `runtime.stages.stage.build_stage`.
    """

    dtype: str
    kv_cache_dtype: str
    device: str | None
    verifies: bool
    cache_tokens: int
    batch_size: int
    speed: str


def load_stage(
    source: Source,
    number: int,
    settings: LoadSettings,
    *,
    progress: Callable[[str], None] = lambda _text: None,
) -> LoadedStage:
    """Load a stage.

    Args:
        source: an export of which at least this stage lies here, or a plan with its checkpoint.
        number: zero-based stage.
        settings: how.
        progress: told what is being done.

    Raises:
        MachineError: memory is short, or the device is missing.
        InputError, IntegrityError: the files are not what they should be.
    """
    started = time.perf_counter()
    spec = source.stages[number]
    device = torch_device(settings.device or spec.device)
    need = stage_need(
        source.checkpoint,
        spec,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        context_tokens=settings.cache_tokens,
        batch_size=settings.batch_size,
    )
    check_room([need], [spec], [device])
    config = parse_model_config(source.checkpoint.config.raw)
    progress("loading")
    with (
        Verification(_only(source, number) if settings.verifies else None) as verification,
        memory_faults("loading the weights"),
    ):
        stage = build_stage(
            config,
            spec,
            FolderTensors(source.checkpoint),
            dtype=torch_dtype(settings.dtype),
            kv_cache_dtype=torch_dtype(settings.kv_cache_dtype),
            device=device,
            speed=settings.speed,
            progress=progress,
        )
        verification.wait(progress)
    return LoadedStage(stage, number, config.hidden_size, time.perf_counter() - started)


def _only(source: Source, number: int) -> Source:
    """Return the source with one bundle: nobody else's bytes are compared here."""
    if source.export is None:
        return source
    return replace(source, export=replace(source.export, bundles={number: source.export.bundles[number]}))


def share_threads(threads: int | None, *, num_processes: int) -> int:
    """Set how many CPU threads this process computes with: the cores shared out, unless a number is given."""
    count = threads or max(1, len(os.sched_getaffinity(0)) // num_processes)
    torch.set_num_threads(count)
    # The threads that send and receive wait for the one that computes; Python's usual 5 ms are longer than a hop.
    sys.setswitchinterval(SWITCH_SECONDS)
    return count
