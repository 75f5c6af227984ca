"""A cut as people write it: layers per stage in chain order, such as ``18,10,4``."""

import re
from collections.abc import Iterable
from itertools import accumulate, pairwise

_COUNTS = re.compile(r"(?:\d{1,5}|\*)(?:,(?:\d{1,5}|\*))*", re.ASCII)


def read_counts(text: str) -> tuple[int | None, ...] | None:
    """Return the layers per stage, None for a number left open (*); None where the text is no such list.

    Example:
        >>> read_counts("18,*,4")
        (18, None, 4)
    """
    if not _COUNTS.fullmatch(text):
        return None
    return tuple(None if part == "*" else int(part) for part in text.split(","))


def layer_ranges(counts: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the half-open ranges of consecutive runs of layers."""
    return tuple(pairwise(accumulate(counts, initial=0)))
