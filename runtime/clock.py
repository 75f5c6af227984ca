"""Where a step's time goes: compute per stage, hops between stages, and the part of computing spent on caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from runtime.chain import Chain
from runtime.devices import synchronize


@dataclass(slots=True)
class StageTime:
    """Seconds one stage has spent. Mask and rotary tables count as compute of the first stage."""

    compute_seconds: float = 0.0
    hop_seconds: float = 0.0
    """Time to bring hidden states (and shared tensors) to this stage from the one before it."""
    cache_seconds: float = 0.0
    """Time to add keys and values to the cache, a part of `compute_seconds`; measured for stages on a CPU."""

    def copy(self) -> "StageTime":
        """Return the totals as they are now."""
        return StageTime(self.compute_seconds, self.hop_seconds, self.cache_seconds)

    def since(self, before: "StageTime") -> "StageTime":
        """Return what was added after an earlier copy."""
        return StageTime(
            self.compute_seconds - before.compute_seconds,
            self.hop_seconds - before.hop_seconds,
            self.cache_seconds - before.cache_seconds,
        )


@contextmanager
def stage_clock(chain: Chain) -> Iterator[list[StageTime]]:
    """Measure every forward of `chain` inside the block.

    An accelerator is synchronised at each stage boundary, since its time cannot be read otherwise; a run that does
    not ask for stage times never is.

    Yields:
        One running total per stage.
    """
    totals = [StageTime() for _ in chain.stages]
    handles = [handle for index in range(len(totals)) for handle in _watch(chain, index, totals[index])]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def cache_clock(chain: Chain, cache: Cache, totals: Sequence[StageTime]) -> Iterator[None]:
    """Measure every update of `cache` inside the block and add it to the totals of `stage_clock`.

    Only stages on a CPU are measured: an accelerator would have to be synchronised twice per layer.
    """
    layers = {
        layer: totals[index]
        for index, (stage, device) in enumerate(zip(chain.stages, chain.stage_devices, strict=True))
        for layer in range(stage.start_layer, stage.end_layer)
        if device.type == "cpu"
    }
    patched: Any = cache
    update = patched.update

    def timed(keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx in layers:
            layers[layer_idx].cache_seconds += time.perf_counter() - started
        return result

    patched.update = timed
    try:
        yield
    finally:
        del patched.update


def _watch(chain: Chain, index: int, total: StageTime) -> list[Any]:
    modules, device = chain.stage_modules(index), chain.stage_devices[index]
    marks = {"enter": 0.0, "start": 0.0}

    def enter(*_: object) -> None:
        marks["enter"] = time.perf_counter()

    def start(*_: object) -> None:
        synchronize(device)
        marks["start"] = time.perf_counter()
        total.hop_seconds += marks["start"] - marks["enter"] if index else 0.0

    def leave(*_: object) -> None:
        synchronize(device)
        total.compute_seconds += time.perf_counter() - marks["start"]

    # The hop is a pre-hook itself, put there when the chain was built: enter runs before it, start after it.
    return [
        modules[0].register_forward_pre_hook(enter, prepend=True),
        modules[0].register_forward_pre_hook(start),
        modules[-1].register_forward_hook(leave),
    ]
