"""Is there room? What a run needs on each device, against what is free there, compared before anything is loaded."""

import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from plans.checkpoint.packed import is_kept
from plans.checkpoint.units import Checkpoint, unit_tables
from plans.commands.machine_memory import memory_bytes
from plans.config.config import ModelConfig
from plans.dtypes import DTYPES
from plans.errors import MachineError
from plans.reading.sizes import format_bytes
from plans.stages import StageRange


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had."""
    try:
        # Not getrusage: there Linux lets a new process inherit the peak of the one that started it.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_NO_MEMORY = re.compile(r"out of memory|(can.t|cannot) allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes one stage needs."""

    weight_bytes: int
    kv_cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and cache together."""
        return self.weight_bytes + self.kv_cache_bytes


def stage_need(
    checkpoint: Checkpoint, spec: StageRange, *, dtype: str, kv_cache_dtype: str, context_tokens: int, batch_size: int
) -> Need:
    """Return what a stage needs for its weights at `dtype` and for a full KV cache at `kv_cache_dtype`."""
    config = checkpoint.config
    owned = [table for table in unit_tables(checkpoint) if spec.owns(table.key)]
    tensors = {name: stored for table in owned for name, stored in table.tensors.items()}
    places = {(s.file, s.entry.begin): (name, s.entry) for name, s in tensors.items()}  # a tied table once
    weights = sum(
        entry.size_bytes if is_kept(name, entry.dtype, config) else entry.num_elements * DTYPES[dtype].size_bytes
        for name, entry in places.values()
    )
    one = kv_cache_bytes(config, spec, kv_cache_dtype=kv_cache_dtype, context_tokens=context_tokens)
    return Need(weights, one * batch_size)


def kv_cache_bytes(config: ModelConfig, spec: StageRange, *, kv_cache_dtype: str, context_tokens: int) -> int:
    """Return what the cache of one sequence of so many tokens takes on a stage."""
    layers = config.attention[spec.start_layer : spec.end_layer]
    numbers = sum(layer.kv_width * min(context_tokens, layer.window or context_tokens) for layer in layers)
    return numbers * DTYPES[kv_cache_dtype].size_bytes


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device right now; on a CPU within the container's limit, if it has one."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
    return memory_bytes()[1]


@contextmanager
def memory_faults(doing: str) -> Iterator[None]:
    """Turn a failed allocation inside the block into an error a person can act on.

    Raises:
        MachineError: memory ran out while `doing`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        free = free_bytes(torch.device("cpu"))
        raise MachineError(
            f"memory ran out while {doing} ({format_bytes(free)} ({free} bytes) are free on the CPU now)",
            hint="lower --ctx-size, --batch-size or --prefill-chunk, or map a stage elsewhere with --device-map",
            code="E-MEMORY",
        ) from None


def check_room(needs: Sequence[Need], specs: Sequence[StageRange], devices: Sequence[torch.device]) -> None:
    """Compare need and free memory, device by device; stages on one device add up.

    Raises:
        MachineError: with both numbers, and the stages concerned.
    """
    total: Counter[torch.device] = Counter()
    for need, device in zip(needs, devices, strict=True):
        total[device] += need.total_bytes
    for device, needed in total.items():
        free = free_bytes(device)
        if needed > free:
            here = "; ".join(s.words for s, d in zip(specs, devices, strict=True) if d == device)
            raise MachineError(
                f"{here} need {format_bytes(needed)} ({needed} bytes), {format_bytes(free)} ({free} bytes) are free",
                where=str(device),
                hint="lower --ctx-size, map a stage elsewhere with --device-map, or plan for less",
                code="E-MEMORY",
            )
