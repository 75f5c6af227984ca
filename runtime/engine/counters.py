"""What the engine has done so far, in numbers."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the buckets of a histogram, in seconds; one more holds all that is longer."""


class Histogram:
    """How many durations fell into which bucket.

    Attributes:
        counts: per bucket, not added up.
        total_seconds: of all of them.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total_seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total_seconds += seconds


@dataclass(slots=True)
class Totals:
    """What only grows."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    """From `submit` to the first token."""
    gaps: Histogram = field(default_factory=Histogram)
    """Between a token and the next one of the same request."""
    endings: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended: a finish reason, or `failed`."""


@dataclass(frozen=True, slots=True)
class Counters:
    """A look at the engine.

    Attributes:
        num_running: requests that have a slot.
        num_waiting: requests that wait for one.
        num_slots: slots.
        kv_tokens_used: tokens in the caches, kept ones included.
        kv_tokens_reserved: tokens that the running requests may still come to, what they have included.
        totals: what happened since the engine was made; do not change it.
    """

    num_running: int
    num_waiting: int
    num_slots: int
    kv_tokens_used: int
    kv_tokens_reserved: int
    totals: Totals
