"""Devices that can be swapped without changing anything, so that a search need not try both."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from planner.problem.problem import Matrix, Problem, max_layers


@dataclass(frozen=True, slots=True)
class Group:
    """Interchangeable devices, in the order given."""

    members: tuple[int, ...]

    @property
    def first(self) -> int:
        """The device that stands for all of them."""
        return self.members[0]

    @property
    def size(self) -> int:
        """How many devices there are."""
        return len(self.members)


def group_devices(problem: Problem) -> tuple[Group, ...]:
    """Return the groups of interchangeable devices, in order of their first member.

    Swapping two members of a group leaves every time, memory size, rule and hop of the problem as it was; that
    relation is transitive, so a device is compared with one member only. In a fixed order no device can be swapped.
    """
    groups: list[list[int]] = []
    for device in range(problem.num_devices):
        home = None if problem.keep_order else next((g for g in groups if _are_twins(problem, g[0], device)), None)
        if home is None:
            groups.append([device])
        else:
            home.append(device)
    return tuple(Group(tuple(members)) for members in groups)


def are_alike(problem: Problem, a: int, b: int) -> bool:
    """Return whether two devices can be swapped, whatever the order they must keep."""
    return _are_twins(problem, a, b)


def between(matrix: Matrix, a: Group, b: Group) -> int | None:
    """Return the hop from a device of `a` to another device of `b` (the same group has to have two members)."""
    if a.first != b.first:
        return matrix[a.first][b.first]
    return matrix[a.members[0]][a.members[1]] if a.size > 1 else None


def _are_twins(problem: Problem, a: int, b: int) -> bool:
    if replace(problem.devices[a], name="") != replace(problem.devices[b], name=""):
        return False
    if any((a in bus.devices) != (b in bus.devices) for bus in problem.buses):
        return False
    return all(_swaps(matrix, a, b) for matrix in _matrices(problem))


def _matrices(problem: Problem) -> Iterator[Matrix]:
    yield problem.decode_hop
    yield problem.return_hop
    yield from problem.prefill_hop


def _swaps(matrix: Matrix, a: int, b: int) -> bool:
    if matrix[a][b] != matrix[b][a] or matrix[a][a] != matrix[b][b]:
        return False
    others = [x for x in range(len(matrix)) if x not in (a, b)]
    return all(matrix[a][x] == matrix[b][x] and matrix[x][a] == matrix[x][b] for x in others)


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
