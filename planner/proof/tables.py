"""Tables that the exact methods share: allowed starts of a stage, prefix times, and the smallest value in a window.

All times are whole ticks in 64 bits; `INFINITE` stands for what cannot be.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.problem.problem import ChainCosts, Problem, prefix_sums

Ints = NDArray[np.int64]
INFINITE = 1 << 61
_ALMOST = 1 << 60


class OutOfTimeError(Exception):
    """The time was up before a proof was complete."""


@dataclass(frozen=True, slots=True)
class Clock:
    """When to give up, on the monotonic clock; None for never."""

    deadline: float | None = None

    def check(self) -> None:
        """Raise OutOfTimeError when the time is up; called between pieces of work of well under a second."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTimeError


FOREVER = Clock()


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds on every single stage, hop and memory bus of a decode step, in ticks; None for no bound."""

    stage: int | None = None
    hop: int | None = None
    bus: int | None = None
    """Only `planner.proof.counts` keeps it."""


def settle(values: Ints) -> Ints:
    """Return `values` with everything that grew out of an impossible entry made impossible again."""
    return np.where(values >= _ALMOST, INFINITE, values)


def all_counts(sizes: list[int]) -> tuple[Ints, list[int]]:
    """Return [state, group]: how many devices of every group are used, for all combinations, and the strides.

    Using one device more of group g is the state `strides[g]` further on.
    """
    shape = [size + 1 for size in sizes]
    strides = [prod(shape[g + 1 :]) for g in range(len(shape))]
    return np.indices(shape, dtype=np.int64).reshape(len(shape), -1).T, strides


def hop_table(matrix: Any, limit: int | None) -> Ints:
    """Return a matrix of hops with the impossible and the forbidden ones infinite."""
    rows = [[INFINITE if cell is None or (limit is not None and cell > limit) else cell for cell in r] for r in matrix]
    return np.array(rows, dtype=np.int64)


@dataclass(frozen=True)
class DeviceTable:
    """What the dynamic programs need to know of one device; positions run from 0 to the number of layers."""

    problem: Problem
    costs: ChainCosts
    device: int
    limits: Limits

    @cached_property
    def prefix(self) -> Ints:
        """Ticks of layers [0, p)."""
        return np.array(prefix_sums(self.costs.units[self.device].layers), dtype=np.int64)

    @cached_property
    def middle_starts(self) -> tuple[Ints, Ints]:
        """For every end p, the first and last position a stage without ends may start at (empty if first > last)."""
        problem, rule = self.problem, self.problem.devices[self.device].rule
        size = problem.num_layers + 1
        ends = np.arange(size)
        most = problem.num_layers if rule.max_layers is None else rule.max_layers
        low = np.maximum(self._fitting_starts(), ends - most)
        high = ends - max(1, rule.min_layers)
        if rule.max_start is not None:
            high = np.minimum(high, rule.max_start)
        for layer in rule.banned:
            low = np.where(ends > layer, np.maximum(low, layer + 1), low)
        is_out = rule.is_banned or rule.embedding is True or rule.head is True
        if is_out or rule.min_end is not None:
            high = np.where(is_out | (ends < (rule.min_end or 0)), -1, high)
        return low, high

    def _fitting_starts(self) -> Ints:
        """First start whose run up to p fits memory and the time limit; both only shrink what fits as runs grow."""
        problem, device = self.problem, self.problem.devices[self.device]
        room = device.limit_bytes - device.overhead_bytes - problem.units.layer_activation
        starts = _first_within(problem.prefix_bytes, room)
        if self.limits.stage is not None:
            starts = np.maximum(starts, _first_within(prefix_sums(device.decode.layers), self.limits.stage))
        return starts

    def allowed(self, starts: Ints, ends: Ints, *, embedding: bool, head: bool) -> NDArray[np.bool_]:
        """Return, for every pair of start and end, whether a stage with the embedding or the head is allowed."""
        problem, device, rule = self.problem, self.problem.devices[self.device], self.problem.devices[self.device].rule
        if rule.is_banned or rule.embedding is (not embedding) or rule.head is (not head):
            return np.zeros(np.broadcast(starts, ends).shape, dtype=np.bool_)
        num = ends - starts
        allowed = (num >= rule.min_layers) & (
            num <= (problem.num_layers if rule.max_layers is None else rule.max_layers)
        )
        allowed &= (rule.max_start is None) | (starts <= (rule.max_start or 0))
        allowed &= (rule.min_end is None) | (ends >= (rule.min_end or 0))
        for layer in rule.banned:
            allowed &= (starts > layer) | (ends <= layer)
        prefix = np.array(problem.prefix_bytes, dtype=np.int64)
        ends_only = problem.stage_bytes(self.device, 0, 0, embedding=embedding, head=head)
        work = problem.activation_bytes(has_layers=True, embedding=embedding, head=head)
        more = work - problem.activation_bytes(has_layers=False, embedding=embedding, head=head)
        allowed &= ends_only + np.where(num > 0, more, 0) + prefix[ends] - prefix[starts] <= device.limit_bytes
        if self.limits.stage is not None:
            times = np.array(prefix_sums(device.decode.layers), dtype=np.int64)
            busy = times[ends] - times[starts] + device.decode.embedding * embedding + device.decode.head * head
            allowed &= busy <= self.limits.stage
        return allowed

    @cached_property
    def first_stage(self) -> Ints:
        """Ticks of a first stage that ends at p (embedding and layers [0, p)), or infinite."""
        ends = np.arange(self.problem.num_layers + 1)
        allowed = self.allowed(np.zeros_like(ends), ends, embedding=True, head=False)
        return np.where(allowed, self.prefix + self.costs.units[self.device].embedding, INFINITE)

    @cached_property
    def last_stage(self) -> Ints:
        """Ticks of a last stage that starts at p (layers [p, end) and the head), or infinite."""
        starts = np.arange(self.problem.num_layers + 1)
        allowed = self.allowed(starts, np.full_like(starts, self.problem.num_layers), embedding=False, head=True)
        return np.where(allowed, self.prefix[-1] - self.prefix + self.costs.units[self.device].head, INFINITE)

    @cached_property
    def only_stage(self) -> int:
        """Ticks of the whole model on this device, or infinite."""
        whole = np.array([self.problem.num_layers])
        if not self.allowed(whole * 0, whole, embedding=True, head=True)[0]:
            return INFINITE
        units = self.costs.units[self.device]
        return units.embedding + sum(units.layers) + units.head

    def origin(self, end: int, value: int, arriving: Ints) -> tuple[int, int]:
        """Return where a middle stage that ends at `end` at the time `value` starts, and when the chain arrives there.

        `arriving` holds the time of the chain at every position.
        """
        low, high = (int(bound[end]) for bound in self.middle_starts)
        for start in range(max(low, 0), high + 1):
            arrived = int(arriving[start])
            if arrived < INFINITE and arrived + int(self.prefix[end] - self.prefix[start]) == value:
                return start, arrived
        raise AssertionError("the certificate cannot explain its own value")


def _first_within(prefix: tuple[int, ...], room: int) -> Ints:
    """For every p the first i with prefix[p] - prefix[i] <= room; p + 1 if not even the empty run is."""
    starts, i = [], 0
    for p, total in enumerate(prefix):
        while i <= p and total - prefix[i] > room:
            i += 1
        starts.append(i)
    return np.array(starts, dtype=np.int64)


def window_minima(values: Ints, low: Ints, high: Ints) -> Ints:
    """Return, along the last axis, min(values[..., low[j] : high[j] + 1]) for every j; infinite where empty.

    A sparse table: the minimum of a window is that of two overlapping windows whose length is a power of two.
    """
    size = values.shape[-1]
    low, high = np.maximum(low, 0), np.minimum(high, size - 1)
    width = high - low + 1
    result = np.full((*values.shape[:-1], len(low)), INFINITE, dtype=np.int64)
    level, span = values, 1
    while span <= size:
        here = np.flatnonzero((width >= span) & (width < 2 * span))
        if len(here):
            result[..., here] = np.minimum(level[..., low[here]], level[..., high[here] - span + 1])
        if 2 * span > size:
            break
        level = np.minimum(level[..., : level.shape[-1] - span], level[..., span:])
        span *= 2
    return result


def return_classes(back: list[list[int | None]]) -> tuple[list[int], Ints]:
    """Merge first stages that cannot be told apart by the way back.

    Args:
        back: [last][first] ticks; None where a pair cannot be (it then says nothing about the class).

    Returns:
        The class of every first, and a table [last][class] of ticks.
    """
    size = len(back)
    columns: list[list[int | None]] = []
    classes: list[int] = []
    for first in range(size):
        column = [back[last][first] for last in range(size)]
        home = next((c for c, known in enumerate(columns) if _agree(known, column)), None)
        if home is None:
            home = len(columns)
            columns.append(column)
        columns[home] = [a if a is not None else b for a, b in zip(columns[home], column, strict=True)]
        classes.append(home)
    table = [[INFINITE if c[last] is None else c[last] for c in columns] for last in range(size)]
    return classes, np.array(table, dtype=np.int64)


def _agree(a: list[int | None], b: list[int | None]) -> bool:
    return all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))
