"""The cheapest chain when the devices keep their order: dynamic programming over (device, layers placed).

`best[d, c, p]` is the least time of a chain whose latest stage is on device d and ends at position p, among chains
whose first stage is of return class c. Devices may be skipped unless they are required.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.problem.problem import Assignment, ChainCosts, Problem, StageChoice
from planner.proof.tables import (
    FOREVER,
    INFINITE,
    Clock,
    DeviceTable,
    Ints,
    Limits,
    hop_table,
    return_classes,
    settle,
    window_minima,
)

METHOD = "dynamic programming over a fixed order"


@dataclass(frozen=True)
class OrderSearch:
    """One problem with additive costs; `cheapest` may be asked again with tighter limits."""

    problem: Problem
    costs: ChainCosts
    clock: Clock = FOREVER

    def cheapest(self, problem: Problem, limits: Limits) -> tuple[int, Assignment] | None:
        """Return the least time and a chain that has it; None if there is no chain.

        Args:
            problem: the search's own problem, perhaps with less memory.
            limits: bounds on single stages and hops.
        """
        return _Run(problem, self.costs, limits, self.clock).answer()


@dataclass(frozen=True)
class _Run:
    problem: Problem
    costs: ChainCosts
    limits: Limits
    clock: Clock

    @cached_property
    def tables(self) -> list[DeviceTable]:
        return [DeviceTable(self.problem, self.costs, d, self.limits) for d in range(self.problem.num_devices)]

    @cached_property
    def hops(self) -> Ints:
        """Ticks from device to device; infinite backwards and over a required device."""
        table = hop_table(self.costs.hop, self.limits.hop)
        for a in range(len(table)):
            for b in range(len(table)):
                if b <= a or any(self.is_required(d) for d in range(a + 1, b)):
                    table[a, b] = INFINITE
        return table

    def is_required(self, device: int) -> bool:
        return self.problem.use_all or self.problem.devices[device].rule.is_required

    @cached_property
    def back(self) -> tuple[list[int], Ints]:
        limit = self.limits.hop
        rows = [
            [None if a == b else INFINITE if t is None or (limit is not None and t > limit) else t
             for b, t in enumerate(row)]
            for a, row in enumerate(self.costs.back)
        ]  # fmt: skip
        return return_classes(rows)

    def may_be_first(self, device: int) -> bool:
        return not any(self.is_required(d) for d in range(device))

    def may_be_last(self, device: int) -> bool:
        return not any(self.is_required(d) for d in range(device + 1, self.problem.num_devices))

    def answer(self) -> tuple[int, Assignment] | None:
        options = [option for d in range(self.problem.num_devices) for option in self._options(d)]
        return min(options, key=lambda option: option[0], default=None)

    def _options(self, device: int) -> list[tuple[int, Assignment]]:
        """The cheapest chain of one stage, and of several, that ends on `device`."""
        if not self.may_be_last(device):
            return []
        options: list[tuple[int, Assignment]] = []
        alone = self.costs.back[device][device]
        if self.may_be_first(device) and alone is not None and (self.limits.hop is None or alone <= self.limits.hop):
            cost = self.tables[device].only_stage + alone
            options.append((cost, (StageChoice(device, 0, self.problem.num_layers),)))
        arriving = self.forward[device].arriving
        totals = (arriving + self.tables[device].last_stage).min(axis=-1) + self.back[1][device]
        count, state = (int(i) for i in np.unravel_index(int(totals.argmin()), totals.shape))
        if totals[count, state] < INFINITE // 2:
            options.append((int(totals[count, state]), self._trace(device, count, state)))
        return [option for option in options if option[0] < INFINITE // 2]

    @cached_property
    def forward(self) -> "list[_Column]":
        """The dynamic program itself, device by device."""
        columns: list[_Column] = []
        # Stages are counted only where their number is limited.
        num_counts = self.problem.max_stages or 1
        shape = (num_counts, self.back[1].shape[1], self.problem.num_layers + 1)
        for d, table in enumerate(self.tables):
            self.clock.check()
            arriving = np.full(shape, INFINITE, dtype=np.int64)
            for before, column in enumerate(columns):
                arriving = np.minimum(arriving, column.leaving(is_counted=self.is_counted) + self.hops[before, d])
            arriving = settle(arriving)
            done = settle(window_minima(arriving - table.prefix, *table.middle_starts) + table.prefix)
            if self.may_be_first(d):
                state = self.back[0][d]
                done[0, state] = np.minimum(done[0, state], table.first_stage)
            columns.append(_Column(arriving, done))
        return columns

    @property
    def is_counted(self) -> bool:
        return self.problem.max_stages is not None

    def _trace(self, device: int, count: int, state: int) -> Assignment:
        """Walk back: every step looks for the predecessor that explains the value exactly."""
        totals = self.forward[device].arriving[count, state] + self.tables[device].last_stage
        start = int(totals.argmin())
        chain = [StageChoice(device, start, self.problem.num_layers)]
        wanted = int(self.forward[device].arriving[count, state, start])
        while True:
            here = chain[-1]
            count -= self.is_counted
            before = next(d for d in range(here.device) if self._explains(d, here, count, state, wanted))
            value = wanted - int(self.hops[before, here.device])
            if self._is_first(before, count, state, here.start, value):
                return (StageChoice(before, 0, here.start), *reversed(chain))
            arriving = self.forward[before].arriving[count, state]
            start, wanted = self.tables[before].origin(here.start, value, arriving)
            chain.append(StageChoice(before, start, here.start))

    def _explains(self, before: int, here: StageChoice, count: int, state: int, wanted: int) -> bool:
        value = int(self.forward[before].done[count, state, here.start])
        return value < INFINITE and value + int(self.hops[before, here.device]) == wanted

    def _is_first(self, device: int, count: int, state: int, end: int, value: int) -> bool:
        can_be = self.may_be_first(device) and self.back[0][device] == state and not (self.is_counted and count)
        return can_be and int(self.tables[device].first_stage[end]) == value


@dataclass(frozen=True, slots=True)
class _Column:
    """Least times for one device, indexed by [stages before it, return class, position]."""

    arriving: Ints
    done: Ints

    def leaving(self, *, is_counted: bool) -> Ints:
        """Times as the next stage sees them: one stage more, where stages are counted."""
        if not is_counted:
            return self.done
        return np.concatenate([np.full_like(self.done[:1], INFINITE), self.done[:-1]])
