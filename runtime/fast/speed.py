"""How stages compute: transformers' own code (reference), or native code or a CUDA graph where they serve (fast)."""

from dataclasses import dataclass
from enum import StrEnum

from plans.errors import UsageError


class Speed(StrEnum):
    """What to compute with, on a CPU and on CUDA."""

    AUTO = "auto"
    """What is fastest here: kernels with as many threads as measured best, graphs where they measured faster."""
    REFERENCE = "reference"
    """transformers' code always: bit-identical to the unsplit model."""
    MAX = "max"
    """Native kernels and CUDA graphs wherever they can be used."""


def parse_speed(name: str) -> Speed:
    """Return the speed of that name.

    Raises:
        UsageError: there is none.
    """
    try:
        return Speed(name)
    except ValueError:
        raise UsageError(f"'{name}' is no speed", where="--speed", expected=", ".join(Speed)) from None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which steps are fast.

    Attributes:
        threads_by_rows: up to so many rows (sequences x new tokens) -> so many threads of kernels (1 for a CUDA graph),
            0 for those that are read layer by layer, or that transformers computes; in order of rows. The last entry
            holds for more rows too.

    >>> Choice(((1, 2), (16, 0))).threads(num_rows=1)
    2
    """

    threads_by_rows: tuple[tuple[int, int], ...]

    def threads(self, *, num_rows: int) -> int:
        """Return the threads for a step of so many rows; 0 where it is no single call."""
        last = self.threads_by_rows[-1][1] if self.threads_by_rows else 0
        return next((threads for most, threads in self.threads_by_rows if num_rows <= most), last)

    @property
    def is_ever_fast(self) -> bool:
        """Whether any step is fast."""
        return any(threads for _, threads in self.threads_by_rows)
