"""Stops in a row, each first come, first served: when does a step that enters now leave the last one?

Steps cannot overtake each other at stops that they visit in the same order, so what happens to a step at all of them is
known the moment it enters (a max-plus recursion, F. Baccelli et al., *Synchronization and Linearity*, 1992):

    leave[i] = max(leave[i-1], free[i]) + t[i]        that is, with T[i] = t[0] + ... + t[i]
    leave[i] = T[i] + max(enter, max over j <= i of free[j] - T[j-1])

One running maximum over an array replaces an event per stop. Only a resource that is visited more than once on the way
(a link between two hosts that the chain crosses twice) can mix steps of different progress: there the row is cut into
parts, and a step enters each part by an event of its own. Times are whole ticks, so that sums are exact.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ticks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of stops; `shared` is the resource of its first stop if others of the row are the same resource."""

    start: int
    end: int
    shared: str | None


@dataclass(slots=True)
class Work:
    """One kind of step: its ticks at every stop, in all and by part, and how often it was done."""

    ticks: Ticks
    through: tuple[Ticks, ...]
    """By part: ticks from its first private stop to the end of each."""
    before: tuple[Ticks, ...]
    """By part: ticks from its first private stop to the start of each."""
    count: int = 0


class Tandem:
    """The state of a row of stops: when each is free again."""

    def __init__(self, resources: Sequence[str]) -> None:
        self.parts = _parts(resources)
        self._free = [np.zeros(_private(part)[1] - _private(part)[0], dtype=np.int64) for part in self.parts]
        self._shared_free = {part.shared: 0 for part in self.parts if part.shared is not None}

    def work(self, ticks: Sequence[int]) -> Work:
        """Return a kind of step with so many ticks at each stop."""
        all_ticks = np.array(ticks, dtype=np.int64)
        private = [all_ticks[slice(*_private(part))] for part in self.parts]
        through = tuple(np.cumsum(own) for own in private)
        return Work(all_ticks, through, tuple(t - own for t, own in zip(through, private, strict=True)))

    def enter(self, work: Work, *, part: int, now: int) -> int:
        """Let a step that stands before `part` at `now` pass through it; return when it leaves the last stop."""
        shared = self.parts[part].shared
        if shared is not None:
            now = max(now, self._shared_free[shared]) + int(work.ticks[self.parts[part].start])
            self._shared_free[shared] = now
        free = self._free[part]
        if not free.size:
            return now
        leave: Ticks = free - work.before[part]
        leave[0] = max(int(leave[0]), now)
        np.maximum.accumulate(leave, out=leave)
        leave += work.through[part]
        self._free[part] = leave
        return int(leave[-1])

    def left(self, part: int) -> Ticks:
        """Return when the step that entered `part` last leaves each of its stops."""
        first = [self._shared_free[shared]] if (shared := self.parts[part].shared) is not None else []
        return np.concatenate([np.array(first, dtype=np.int64), self._free[part]])

    def left_first(self) -> int:
        """Return when the step that entered last leaves the first stop of the row."""
        return int(self._free[0][0])


def _private(part: Part) -> tuple[int, int]:
    return part.start + (part.shared is not None), part.end


def _parts(resources: Sequence[str]) -> tuple[Part, ...]:
    """Cut before every stop whose resource occurs again; the first stop, a stage, never does."""
    visits = Counter(resources)
    cuts = [index for index, name in enumerate(resources) if visits[name] > 1]
    bounds = [0, *cuts, len(resources)]
    return tuple(Part(start, end, resources[start] if start in cuts else None) for start, end in pairwise(bounds))
