"""A lower bound on the memory share that ignores the path; it lets the solver stop as soon as it reaches it."""

from fractions import Fraction

from planner.problem.groups import Group
from planner.problem.problem import Problem, max_layers

_STEPS = 40


def least_share(problem: Problem, groups: tuple[Group, ...]) -> float:
    """Return a share that no chain can reach or undercut, for identical layers.

    Below it, not even all devices together have room for all layers, whichever two hold the embedding and the head.
    """
    low, high = Fraction(0), Fraction(1)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if has_room(problem.with_share_limit(middle), groups):
            high = middle
        else:
            low = middle
    return float(low)


def has_room(problem: Problem, groups: tuple[Group, ...]) -> bool:
    """Return whether all devices together hold all (identical) layers, for some choice of the two ends."""

    def room(group: Group, *, embedding: bool, head: bool) -> int:
        return max_layers(problem, group.first, embedding=embedding, head=head)

    if any(room(g, embedding=True, head=True) >= problem.num_layers for g in groups):
        return True
    middles = [max(room(g, embedding=False, head=False), 0) for g in groups]
    total = sum(g.size * layers for g, layers in zip(groups, middles, strict=True))
    # What a device holds more (or less) than between the ends when it is the first, or the last; None: it cannot be.
    firsts = [_gain(room(g, embedding=True, head=False), m) for g, m in zip(groups, middles, strict=True)]
    lasts = [_gain(room(g, embedding=False, head=True), m) for g, m in zip(groups, middles, strict=True)]
    ranked = sorted((gain, b) for b, gain in enumerate(lasts) if gain is not None)[-2:]
    return any(
        total + first + last >= problem.num_layers
        for a, first in enumerate(firsts)
        for last, b in ranked
        if first is not None and (a != b or groups[a].size > 1)
    )


def _gain(room: int, middle: int) -> int | None:
    return room - middle if room >= 0 else None
