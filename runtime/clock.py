"""Where a step's time goes: compute per stage, and hops between stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime.chain import Chain
from runtime.devices import synchronize


@dataclass(slots=True)
class StageTime:
    """Seconds one stage has spent. Mask and rotary tables count as compute of the first stage."""

    compute_seconds: float = 0.0
    hop_seconds: float = 0.0
    """Time to bring hidden states (and shared tensors) to this stage from the one before it."""

    def copy(self) -> "StageTime":
        """Return the totals as they are now."""
        return StageTime(self.compute_seconds, self.hop_seconds)

    def since(self, before: "StageTime") -> "StageTime":
        """Return what was added after an earlier copy."""
        return StageTime(self.compute_seconds - before.compute_seconds, self.hop_seconds - before.hop_seconds)


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
