"""Where a step's time goes: compute per stage, hops between stages, and the part of computing spent on caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import Cache

from runtime.reading.devices import synchronize
from runtime.stage_time import StageTime, StageTimes, since
from runtime.stages.chain import Chain


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
    chain.stage_times = totals  # fast stages call no hook of a module
    try:
        yield totals
    finally:
        chain.stage_times = ()
        for handle in handles:
            handle.remove()


@contextmanager
def cache_clock(chain: Chain, totals: Sequence[StageTime]) -> Iterator[None]:
    """Measure every update of a cache inside the block and add it to the totals of `stage_clock`.

    Only stages on a CPU are measured: an accelerator would have to be synchronised twice per layer.
    """
    layers = {
        layer: totals[index]
        for index, (stage, device) in enumerate(zip(chain.stages, chain.stage_devices, strict=True))
        for layer in range(stage.start_layer, stage.end_layer)
        if device.type == "cpu"
    }
    caches: Any = Cache
    update = caches.update

    def timed(cache: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = update(cache, keys, values, layer_idx, *args, **kwargs)
        if layer_idx in layers:
            layers[layer_idx].cache_seconds += time.perf_counter() - started
        return result

    caches.update = timed
    try:
        yield
    finally:
        caches.update = update


class ChainWatch:
    """What the stages of a chain spend while it is measured; see `runtime.engine.model.StageWatch`.

    Args:
        totals: of `stage_clock`.
    """

    def __init__(self, totals: Sequence[StageTime]) -> None:
        self._totals = totals
        self._step = self._prefill = self._copy()

    def prompts_are_read(self) -> None:
        """Note that what follows is decoding."""
        self._prefill = self._copy()

    def take_step(self) -> StageTimes:
        """Return what each stage spent since this was last asked."""
        before, self._step = self._step, self._copy()
        return since(self._totals, before)

    def phases(self) -> tuple[StageTimes, StageTimes]:
        """Return what each stage spent on prompts, and on decoding."""
        return self._prefill, since(self._totals, self._prefill)

    def _copy(self) -> StageTimes:
        return tuple(total.copy() for total in self._totals)


@contextmanager
def watch_chain(chain: Chain) -> Iterator[ChainWatch]:
    """Measure the stages of a chain inside the block."""
    with stage_clock(chain) as totals, cache_clock(chain, totals):
        yield ChainWatch(totals)


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
