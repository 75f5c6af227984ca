"""What one step of a generation did, for whoever watches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.stage_time import StageTime


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One finished step.

    Attributes:
        step: 0 for the prompt, k for the k-th token after the first.
        batch_size: sequences.
        num_tokens: tokens per sequence that were read in this step (padding included).
        num_past_tokens: tokens per sequence that were in the cache before.
        stages: seconds per stage; empty when stage times were not asked for.
        token_ids: the token chosen for every sequence.
    """

    step: int
    batch_size: int
    num_tokens: int
    num_past_tokens: int
    stages: tuple[StageTime, ...]
    token_ids: tuple[int, ...]


OnStep = Callable[[StepTrace], None]


def since(totals: Sequence[StageTime], before: Sequence[StageTime]) -> tuple[StageTime, ...]:
    """Return what each stage's total gained."""
    return tuple(total.since(earlier) for total, earlier in zip(totals, before, strict=True))
