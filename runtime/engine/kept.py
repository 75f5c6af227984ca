"""Caches that idle slots keep: the next prompt that begins like one of them does not read that beginning again."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The cache of a sequence that has ended.

    Attributes:
        sequence: its number on all stages.
        token_ids: what the cache holds.
        reuse_key: of whom it is.
    """

    sequence: int
    token_ids: list[int]
    reuse_key: str


class KeptCaches:
    """Caches of idle slots, the one unused for longest first.

    Args:
        can_be_cut: whether the end of a cache can be taken back.
    """

    def __init__(self, *, can_be_cut: bool) -> None:
        self._can_be_cut = can_be_cut
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(kept.token_ids) for kept in self._kept]

    def add(self, kept: Kept) -> None:
        """Keep one more."""
        self._kept.append(kept)

    def drop_oldest(self) -> Kept:
        """Give up the one unused for longest, and return it."""
        return self._kept.pop(0)

    def clear(self) -> None:
        """Give up all of them."""
        self._kept.clear()

    def best(self, prompt_ids: Sequence[int], *, reuse_key: str) -> tuple[Kept, int] | None:
        """Return the cache with the longest beginning of a prompt but its last token, and how long that is."""
        wanted = list(prompt_ids[:-1])
        mine = [(self._usable(kept.token_ids, wanted), kept) for kept in self._kept if kept.reuse_key == reuse_key]
        length, kept = max(mine, key=lambda pair: pair[0], default=(0, None))
        return (kept, length) if kept is not None and length else None

    def remove(self, kept: Kept) -> None:
        """Hand a cache on to whoever continues it."""
        self._kept.remove(kept)

    def _usable(self, held: list[int], wanted: list[int]) -> int:
        length = common_beginning(held, wanted)
        return length if length == len(held) or self._can_be_cut else 0


def common_beginning(first: list[int], second: list[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning.

    >>> common_beginning([1, 2, 3, 4], [1, 2, 9])
    2
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
