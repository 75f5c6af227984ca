"""Where caches lie. An idle slot keeps its tokens, so that a prompt that begins like them reads only the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Slot:
    """A place for the cache of one sequence.

    Attributes:
        number: which one.
        sequence: whose cache lies there, or lay there last; None while nothing ever did.
        token_ids: what it holds while it is idle.
        reuse_key: of whom that is; None if nobody may go on from there.
    """

    number: int
    sequence: int | None = None
    token_ids: list[int] = field(default_factory=list)
    reuse_key: str | None = None


class Slots:
    """The idle slots, the one unused for longest first.

    Args:
        num_slots: all of them.
        can_be_cut: whether the end of a cache can be taken back.
    """

    def __init__(self, num_slots: int, *, can_be_cut: bool) -> None:
        self._can_be_cut = can_be_cut
        self._idle = [Slot(number) for number in range(num_slots)]

    def __len__(self) -> int:
        return len(self._idle)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._idle)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each idle slot keeps."""
        return [len(slot.token_ids) for slot in self._idle]

    def best(self, prompt_ids: Sequence[int], *, reuse_key: str | None) -> tuple[Slot, int]:
        """Return the slot with the longest beginning of a prompt, and how long that is; the last token is read anew.

        Where nothing begins alike, it is an empty slot if there is one, else the one unused for longest.
        """
        wanted = list(prompt_ids[:-1])
        shared = [self._shared(slot, wanted) if slot.reuse_key == reuse_key else 0 for slot in self._idle]
        return max(zip(self._idle, shared, strict=True), key=lambda pair: (pair[1], not pair[0].token_ids))

    def take(self, slot: Slot) -> None:
        """Let a sequence have a slot."""
        self._idle.remove(slot)

    def give_back(self, slot: Slot) -> None:
        """Take a slot back, with what it keeps."""
        self._idle.append(slot)

    def kept(self) -> list[Slot]:
        """Return the idle slots that keep tokens, the one unused for longest first."""
        return [slot for slot in self._idle if slot.token_ids]

    def _shared(self, slot: Slot, wanted: list[int]) -> int:
        length = common_beginning(slot.token_ids, wanted) if slot.reuse_key is not None else 0
        return length if length == len(slot.token_ids) or self._can_be_cut else 0


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
