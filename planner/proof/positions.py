"""The cheapest chain over groups of devices when layers differ: Held-Karp over (devices used, latest, layers placed).

As `exact_counts`, but which layers a device holds matters, so the position in the model is part of the state.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from planner.problem.groups import Group, between, group_devices
from planner.problem.problem import Assignment, ChainCosts, Problem, StageChoice
from planner.proof.tables import (
    FOREVER,
    INFINITE,
    Clock,
    DeviceTable,
    Ints,
    Limits,
    all_counts,
    hop_table,
    return_classes,
    settle,
    window_minima,
)

METHOD = "Held-Karp over device groups and positions"
MOST_STATES = 30_000_000


def num_states(problem: Problem, groups: tuple[Group, ...]) -> int:
    """Return the size of the table, with the first stage as part of the state (an upper bound)."""
    return prod(group.size + 1 for group in groups) * len(groups) ** 2 * (problem.num_layers + 1)


@dataclass(frozen=True)
class PositionsSearch:
    """One problem with additive costs; `cheapest` may be asked again with tighter limits."""

    problem: Problem
    costs: ChainCosts
    clock: Clock = FOREVER

    def cheapest(self, problem: Problem, limits: Limits) -> tuple[int, Assignment] | None:
        """Return the least time and a chain that has it; None if there is no chain (as `OrderSearch.cheapest`)."""
        return _Run(problem, self.costs, limits, self.clock).answer()


@dataclass(frozen=True)
class _Run:
    problem: Problem
    costs: ChainCosts
    limits: Limits
    clock: Clock

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return group_devices(self.problem)

    @cached_property
    def tables(self) -> list[DeviceTable]:
        return [DeviceTable(self.problem, self.costs, group.first, self.limits) for group in self.groups]

    @cached_property
    def states(self) -> tuple[Ints, list[int]]:
        return all_counts([group.size for group in self.groups])

    @property
    def counts(self) -> Ints:
        return self.states[0]

    @property
    def strides(self) -> list[int]:
        return self.states[1]

    @cached_property
    def hops(self) -> Ints:
        return hop_table([[between(self.costs.hop, a, b) for b in self.groups] for a in self.groups], self.limits.hop)

    @cached_property
    def back(self) -> tuple[list[int], Ints]:
        table = hop_table([[between(self.costs.back, a, b) for b in self.groups] for a in self.groups], self.limits.hop)
        rows: list[list[int | None]] = [[int(cell) for cell in row] for row in table]
        for g, group in enumerate(self.groups):
            if group.size == 1:
                rows[g][g] = None  # the same device cannot be first and last of two stages
        return return_classes(rows)

    @cached_property
    def is_final(self) -> NDArray[np.bool_]:
        """Whether a chain may use exactly these devices."""
        totals = self.counts.sum(axis=1)
        final: NDArray[np.bool_] = totals >= 1
        if self.problem.max_stages is not None:
            final &= totals <= self.problem.max_stages
        for g, group in enumerate(self.groups):
            if self.problem.use_all or self.problem.devices[group.first].rule.is_required:
                final &= self.counts[:, g] == group.size
        return final

    @cached_property
    def done(self) -> Ints:
        """[state, latest, class, position]: least time of a chain whose latest stage is done there."""
        num, num_classes, size = len(self.groups), self.back[1].shape[1], self.problem.num_layers + 1
        done = np.full((len(self.counts), num, num_classes, size), INFINITE, dtype=np.int64)
        for g, table in enumerate(self.tables):
            done[self.strides[g], g, self.back[0][g]] = table.first_stage
        totals = self.counts.sum(axis=1)
        for level in range(2, int(totals.max()) + 1):
            states = np.flatnonzero(totals == level)
            for g, table in enumerate(self.tables):
                self.clock.check()
                here = states[self.counts[states, g] > 0]
                if len(here):
                    arriving = self._arriving(done, here, g)
                    placed = window_minima(arriving - table.prefix, *table.middle_starts) + table.prefix
                    done[here, g] = settle(placed)
        return done

    def _arriving(self, done: Ints, states: Ints, g: int) -> Ints:
        before = done[states - self.strides[g]]
        return settle((before + self.hops[:, g][:, None, None]).min(axis=1))

    def answer(self) -> tuple[int, Assignment] | None:
        options = [option for g in range(len(self.groups)) for option in self._options(g)]
        return min(options, key=lambda option: option[0], default=None)

    def _options(self, g: int) -> list[tuple[int, Assignment]]:
        """The cheapest chain of one stage, and of several, whose last stage is on group g."""
        options: list[tuple[int, Assignment]] = []
        device, num_layers = self.groups[g].first, self.problem.num_layers
        alone = self.costs.back[device][device]
        is_near = alone is not None and (self.limits.hop is None or alone <= self.limits.hop)
        if alone is not None and is_near and self.is_final[self.strides[g]]:
            options.append((self.tables[g].only_stage + alone, (StageChoice(device, 0, num_layers),)))
        totals = self.counts.sum(axis=1)
        states = np.flatnonzero(self.is_final & (totals >= 2) & (self.counts[:, g] > 0))
        if len(states):
            arriving = self._arriving(self.done, states, g)
            costs = (arriving + self.tables[g].last_stage).min(axis=-1) + self.back[1][g]
            row, kind = (int(i) for i in np.unravel_index(int(costs.argmin()), costs.shape))
            if costs[row, kind] < INFINITE // 2:
                options.append((int(costs[row, kind]), self._trace(int(states[row]), g, kind)))
        return [option for option in options if option[0] < INFINITE // 2]

    def _trace(self, state: int, g: int, kind: int) -> Assignment:
        """Walk back: every step looks for the predecessor that explains the value exactly."""
        arriving = self._arriving(self.done, np.array([state]), g)[0, kind]
        start, end = int((arriving + self.tables[g].last_stage).argmin()), self.problem.num_layers
        chain = [(g, start, end)]
        wanted = int(arriving[start])
        while True:
            state -= self.strides[g]
            through = self.done[state, :, kind, start] + self.hops[:, g]
            g = int(np.flatnonzero(through == wanted)[0])
            value, end = int(self.done[state, g, kind, start]), start
            if int(self.counts[state].sum()) == 1:
                return self._name([(g, 0, end), *reversed(chain)])
            arriving = self._arriving(self.done, np.array([state]), g)[0, kind]
            start, wanted = self.tables[g].origin(end, value, arriving)
            chain.append((g, start, end))

    def _name(self, chain: list[tuple[int, int, int]]) -> Assignment:
        free = [list(group.members) for group in self.groups]
        return tuple(StageChoice(free[g].pop(0), start, end) for g, start, end in chain)
