"""Seconds of one stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from plans.stages import StageRange

REFERENCE_PATH = "reference"
FAST_PATH = "fast"


@dataclass(slots=True)
class StageTime:
    """What one stage has spent. Mask and rotary tables count as compute of the first stage."""

    compute_seconds: float = 0.0
    hop_seconds: float = 0.0
    """Time to bring hidden states (and shared tensors) to this stage from the one before it."""
    cache_seconds: float = 0.0
    """Time to add keys and values to the cache, a part of `compute_seconds`; measured for stages on a CPU. The native
    kernels write them while they compute, which is not measured apart."""
    num_fast_steps: int = 0
    """Forwards that native kernels or CUDA graphs computed."""

    @property
    def path(self) -> str:
        """Which path served: `fast` if native kernels or CUDA graphs computed anything."""
        return FAST_PATH if self.num_fast_steps else REFERENCE_PATH

    def copy(self) -> "StageTime":
        """Return the totals as they are now."""
        return StageTime(self.compute_seconds, self.hop_seconds, self.cache_seconds, self.num_fast_steps)

    def since(self, before: "StageTime") -> "StageTime":
        """Return what was added after an earlier copy."""
        return StageTime(
            self.compute_seconds - before.compute_seconds,
            self.hop_seconds - before.hop_seconds,
            self.cache_seconds - before.cache_seconds,
            self.num_fast_steps - before.num_fast_steps,
        )


StageTimes = tuple[StageTime, ...]
"""One entry per stage of the chain; empty where nothing was measured."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One finished step.

    Attributes:
        step: 0 for the prompt, k for the k-th token after the first.
        batch_size: sequences.
        num_tokens: tokens per sequence that were read in this step, of the longest prompt in the first one.
        num_past_tokens: tokens per sequence that were in the cache before.
        stages: seconds per stage; empty when stage times were not asked for.
        token_ids: the token chosen for every sequence.
    """

    step: int
    batch_size: int
    num_tokens: int
    num_past_tokens: int
    stages: StageTimes
    token_ids: tuple[int, ...]


OnStep = Callable[[StepTrace], None]


def since(totals: Sequence[StageTime], before: Sequence[StageTime]) -> StageTimes:
    """Return what each stage's total gained."""
    return tuple(total.since(earlier) for total, earlier in zip(totals, before, strict=True))


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of a running session.

    Attributes:
        spec: its units.
        device: where it really is.
        decode_read_bytes: weight bytes it reads in a decode step.
    """

    spec: StageRange
    device: str
    decode_read_bytes: int


class StageWatch(Protocol):
    """What the stages spend, while somebody asks."""

    def prompts_are_read(self) -> None:
        """Note that what follows is decoding."""

    def take_step(self) -> StageTimes:
        """Return what each stage spent since this was last asked."""

    def phases(self) -> tuple[StageTimes, StageTimes]:
        """Return what each stage spent on prompts, and on decoding."""
