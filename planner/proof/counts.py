"""The cheapest chain over groups of interchangeable devices when all layers are alike: Held-Karp over counts.

The hops depend only on how many devices of each group are used and in which order, the layers only on how many are
used and which two hold the ends. So: the cheapest path for every (counts, first group, last group), and for each the
cheapest filling, which gives the fastest devices as many layers as they hold.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from planner.problem.groups import Group, between, group_devices
from planner.problem.problem import Assignment, ChainCosts, Problem, StageChoice, max_layers
from planner.proof.tables import FOREVER, INFINITE, Clock, Ints, Limits, all_counts, hop_table, settle

METHOD = "Held-Karp over device groups"
MOST_STATES = 12_000_000
_BLOCK = 1 << 17
"""Rows looked at in one go."""


def num_states(groups: tuple[Group, ...]) -> int:
    """Return the size of the table: used counts x first group x last group."""
    return prod(group.size + 1 for group in groups) * len(groups) ** 2


@dataclass(frozen=True)
class _Paths:
    """All ways to visit devices: one row per (counts, first group, last group), by the least time of the hops."""

    states: Ints
    firsts: Ints
    lasts: Ints
    hops: Ints

    def block(self, begin: int) -> "_Paths":
        """Return the next rows from `begin` on."""
        part = slice(begin, begin + _BLOCK)
        return _Paths(self.states[part], self.firsts[part], self.lasts[part], self.hops[part])


@dataclass
class CountsSearch:
    """One problem with additive costs; `cheapest` may be asked again with tighter limits."""

    problem: Problem
    costs: ChainCosts
    clock: Clock = FOREVER
    most_time: int | None = None
    """Only chains that take no longer are looked for; fewer rows to look at under tighter limits."""
    _paths: dict[int, _Paths] = field(default_factory=dict)
    _tables: dict[int, Ints] = field(default_factory=dict)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return group_devices(self.problem)

    @cached_property
    def _states(self) -> tuple[Ints, list[int]]:
        return all_counts([group.size for group in self.groups])

    @property
    def counts(self) -> Ints:
        """[state, group]: how many devices of the group are used."""
        return self._states[0]

    @property
    def strides(self) -> list[int]:
        """How far on the state with one device more of a group is."""
        return self._states[1]

    def cheapest(self, problem: Problem, limits: Limits) -> tuple[int, Assignment] | None:
        """Return the least time and a chain that has it; None if there is no chain (as `OrderSearch.cheapest`)."""
        filling = _Filling(self, problem, limits)
        options = [option for option in (self._alone(problem, limits), self._several(filling)) if option]
        best = min(options, key=lambda option: option[0], default=None)
        return None if best is None or (self.most_time is not None and best[0] > self.most_time) else best

    def narrow(self, most_time: int) -> "CountsSearch":
        """Return a search for chains of at most `most_time`, which keeps only the rows that can be that fast."""
        narrowed = CountsSearch(self.problem, self.costs, self.clock, most_time, _tables=self._tables)
        rows = self._paths_within(Limits())
        totals = _Filling(self, self.problem, Limits()).all_totals(rows)
        narrowed._paths[self._distinct_hop(None)] = _select(rows, totals <= most_time)
        return narrowed

    def keep_only(self, problem: Problem) -> None:
        """Forget the rows that have no chain within `problem`; for a search whose limits only get tighter."""
        key = self._distinct_hop(None)
        rows = self._paths_within(Limits())
        self._paths[key] = _select(rows, _Filling(self, problem, Limits()).all_totals(rows) < INFINITE // 2)

    def _alone(self, problem: Problem, limits: Limits) -> tuple[int, Assignment] | None:
        """The cheapest chain of a single stage."""
        options: list[tuple[int, Assignment]] = []
        required = sum(g.size for g, is_required in zip(self.groups, self._required, strict=True) if is_required)
        for group, is_required in zip(self.groups, self._required, strict=True):
            back = self.costs.back[group.first][group.first]
            if required - group.size * is_required or (is_required and group.size > 1) or back is None:
                continue
            if _capacity(problem, group.first, limits, embedding=True, head=True) < problem.num_layers:
                continue
            if limits.hop is not None and back > limits.hop:
                continue
            if not _is_bus_free(problem, group.first, limits):
                continue
            units = self.costs.units[group.first]
            cost = units.embedding + units.head + sum(units.layers) + back
            options.append((cost, (StageChoice(group.first, 0, problem.num_layers),)))
        return min(options, key=lambda option: option[0], default=None)

    @cached_property
    def _required(self) -> list[bool]:
        devices = self.problem.devices
        return [self.problem.use_all or devices[group.first].rule.is_required for group in self.groups]

    def _several(self, filling: "_Filling") -> tuple[int, Assignment] | None:
        rows = self._paths_within(filling.limits)
        if not len(rows.states):
            return None
        best, at = INFINITE // 2, -1
        fastest = min(units.layers[0] for units in self.costs.units) * self.problem.num_layers
        for begin in range(0, len(rows.states), _BLOCK):
            # Rows come by the time of their hops: once hops and the fastest layers are too slow, all others are.
            if int(rows.hops[begin]) + fastest >= best:
                break
            totals = filling.totals(rows.block(begin))
            here = int(totals.argmin())
            if totals[here] < best:
                best, at = int(totals[here]), begin + here
        if at < 0:
            return None
        order = self._order(int(rows.states[at]), int(rows.firsts[at]), int(rows.lasts[at]), filling.limits)
        return best, filling.stages(order)

    def _paths_within(self, limits: Limits) -> _Paths:
        """The rows that can be a chain at all; hops that are all allowed share one table."""
        key = self._distinct_hop(limits.hop)
        if key not in self._paths:
            self._paths[key] = self._rows(self._table(limits), limits)
        return self._paths[key]

    def _distinct_hop(self, limit: int | None) -> int:
        """The largest hop there is within `limit`: two limits with the same one allow the same hops."""
        if limit is None:
            return INFINITE
        hops = {t for matrix in (self.costs.hop, self.costs.back) for row in matrix for t in row if t is not None}
        return INFINITE if limit >= max(hops, default=0) else max((t for t in hops if t <= limit), default=-1)

    def _hops(self, limits: Limits) -> Ints:
        return hop_table([[between(self.costs.hop, a, b) for b in self.groups] for a in self.groups], limits.hop)

    def _table(self, limits: Limits) -> Ints:
        """[state, first, last]: least time of the hops of a path that uses exactly these devices."""
        key = self._distinct_hop(limits.hop)
        if key not in self._tables:
            table = self._build_table(limits)
            self._tables.clear()  # they are large
            self._tables[key] = table
        return self._tables[key]

    def _build_table(self, limits: Limits) -> Ints:
        num = len(self.groups)
        hops = self._hops(limits)
        table = np.full((len(self.counts), num, num), INFINITE, dtype=np.int64)
        totals = self.counts.sum(axis=1)
        for g in range(num):
            table[self.strides[g], g, g] = 0
        for level in range(2, int(totals.max()) + 1):
            states = np.flatnonzero(totals == level)
            for last in range(num):
                self.clock.check()
                here = states[self.counts[states, last] > 0]
                before = table[here - self.strides[last]]
                table[here, :, last] = settle((before + hops[:, last]).min(axis=-1))
        return table

    def _rows(self, table: Ints, limits: Limits) -> _Paths:
        totals = self.counts.sum(axis=1)
        is_wanted = totals >= 2
        if self.problem.max_stages is not None:
            is_wanted &= totals <= self.problem.max_stages
        for g, group in enumerate(self.groups):
            if self._required[g]:
                is_wanted &= self.counts[:, g] == group.size
        back = hop_table([[between(self.costs.back, b, a) for b in self.groups] for a in self.groups], limits.hop)
        table = np.where(is_wanted[:, None, None], table + back, INFINITE)
        self.clock.check()
        found = np.flatnonzero(table < INFINITE // 2)
        found = found[np.argsort(table.ravel()[found], kind="stable")]
        states, firsts, lasts = np.unravel_index(found, table.shape)
        return _Paths(states, firsts, lasts, table.ravel()[found])

    def _order(self, state: int, first: int, last: int, limits: Limits) -> list[int]:
        """Return the groups along the cheapest path, walking the table backwards."""
        table, hops = self._table(limits), self._hops(limits)
        order = [last]
        while int(self.counts[state].sum()) > 1:
            before_state = state - self.strides[order[-1]]
            through = table[before_state, first] + hops[:, order[-1]]
            state = before_state
            order.append(int(through.argmin()))
        return order[::-1]


def _select(rows: _Paths, keep: NDArray[np.bool_]) -> _Paths:
    return _Paths(rows.states[keep], rows.firsts[keep], rows.lasts[keep], rows.hops[keep])


@dataclass(frozen=True)
class _Filling:
    """Capacities under limits, and the cheapest way to spread the layers over the devices of a path."""

    search: CountsSearch
    problem: Problem
    limits: Limits

    def capacities(self, *, embedding: bool, head: bool) -> Ints:
        """Largest number of layers per group in this role; -1 where the role is impossible."""
        groups = self.search.groups
        found = [_capacity(self.problem, g.first, self.limits, embedding=embedding, head=head) for g in groups]
        return np.array(found, dtype=np.int64)

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """Capacities of first and last stages."""
        return self.capacities(embedding=True, head=False), self.capacities(embedding=False, head=True)

    @cached_property
    def middles(self) -> Ints:
        """Capacities of the stages between."""
        return self.capacities(embedding=False, head=False)

    @cached_property
    def least(self) -> Ints:
        """Fewest layers of a first or last stage, per group; a stage between holds at least one."""
        devices = self.problem.devices
        return np.array([devices[g.first].rule.min_layers for g in self.search.groups], dtype=np.int64)

    def all_totals(self, rows: _Paths) -> Ints:
        """Return `totals` of all rows, block by block."""
        blocks = [self.totals(rows.block(begin)) for begin in range(0, len(rows.states), _BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)

    def totals(self, rows: _Paths) -> Ints:
        """Return the least time of every row with its layers placed; infinite where they do not fit."""
        self.search.clock.check()
        firsts, lasts = self.ends
        counts = self.search.counts
        least_middle = np.maximum(self.least, 1)
        is_valid = (firsts[rows.firsts] >= 0) & (lasts[rows.lasts] >= 0)
        placed = self.least[rows.firsts] + self.least[rows.lasts]
        numbers = []
        for g in range(len(self.search.groups)):
            between_ends = counts[rows.states, g] - (rows.firsts == g) - (rows.lasts == g)
            is_valid &= (between_ends == 0) | (self.middles[g] >= least_middle[g])
            placed += between_ends * least_middle[g]
            numbers.append(between_ends)
        left = self.problem.num_layers - placed
        is_valid &= left >= 0
        room_on_bus = self._room_on_buses(rows, numbers)
        for room in room_on_bus:
            is_valid &= room >= 0
        units = self.search.costs.units
        cost = rows.hops.copy()
        for g in sorted(range(len(numbers)), key=self._layer_ticks):
            first, last = rows.firsts == g, rows.lasts == g
            base = numbers[g] * least_middle[g] + (first.astype(np.int64) + last) * self.least[g]
            room = numbers[g] * max(int(self.middles[g] - least_middle[g]), 0)
            room += first * max(int(firsts[g] - self.least[g]), 0) + last * max(int(lasts[g] - self.least[g]), 0)
            bus = self.bus_of[g]
            room = room if bus is None else np.minimum(room, np.maximum(room_on_bus[bus], 0))
            taken = np.clip(left, 0, room)
            left = left - taken
            if bus is not None:
                room_on_bus[bus] = room_on_bus[bus] - taken
            times = units[self.search.groups[g].first]
            cost += (base + taken) * times.layers[0] + first * times.embedding + last * times.head
        return np.where(is_valid & (left == 0), cost, INFINITE)

    @cached_property
    def bus_of(self) -> list[int | None]:
        """The bus of each group, None for none or where none is limited."""
        if self.limits.bus is None:
            return [None] * len(self.search.groups)
        buses = self.problem.buses
        return [next((b for b, bus in enumerate(buses) if g.first in bus.devices), None) for g in self.search.groups]

    def _room_on_buses(self, rows: _Paths, numbers: list[Ints]) -> list[Ints]:
        """Return, for every bus and row, the layers that may still be read through it; below 0 if it is too busy.

        Layers are alike and all devices of a bus read alike through it, so the limit is one on their number; taking
        the fastest devices first stays best, as the limits (on a device, on all devices of a bus) are nested.
        """
        if self.limits.bus is None:
            return []
        rooms = []
        for b, bus in enumerate(self.problem.buses):
            busy, held = np.zeros_like(rows.hops), np.zeros_like(rows.hops)
            for g in (g for g, home in enumerate(self.bus_of) if home == b):
                first, last = rows.firsts == g, rows.lasts == g
                busy += first * bus.units.embedding + last * bus.units.head
                held += numbers[g] * max(int(self.least[g]), 1) + (first.astype(np.int64) + last) * self.least[g]
            rooms.append(_layers_within(self.limits.bus - busy, bus.units.layers[0]) - held)
        return rooms

    def _layer_ticks(self, g: int) -> int:
        return self.search.costs.units[self.search.groups[g].first].layers[0]

    def stages(self, order: list[int]) -> Assignment:
        """Spread the layers over a path of groups, the fastest first, and name the devices."""
        firsts, lasts = self.ends
        last = len(order) - 1
        least = [int(self.least[g]) if i in (0, last) else max(int(self.least[g]), 1) for i, g in enumerate(order)]
        most = [int(firsts[g] if i == 0 else lasts[g] if i == last else self.middles[g]) for i, g in enumerate(order)]
        left = self.problem.num_layers - sum(least)
        held = list(least)
        room_on_bus = self._room_along(order, least)
        for i in sorted(range(len(order)), key=lambda i: (self._layer_ticks(order[i]), i)):
            bus = self.bus_of[order[i]]
            extra = min(left, most[i] - least[i], left if bus is None else room_on_bus[bus])
            if bus is not None:
                room_on_bus[bus] -= extra
            held[i] += extra
            left -= extra
        free = [list(group.members) for group in self.search.groups]
        stages: list[StageChoice] = []
        position = 0
        for g, count in zip(order, held, strict=True):
            stages.append(StageChoice(free[g].pop(0), position, position + count))
            position += count
        return tuple(stages)

    def _room_along(self, order: list[int], least: list[int]) -> list[int]:
        """As `_room_on_buses`, of one path."""
        if self.limits.bus is None:
            return []
        rooms = []
        for b, bus in enumerate(self.problem.buses):
            ends = (self.bus_of[order[0]] == b) * bus.units.embedding + (self.bus_of[order[-1]] == b) * bus.units.head
            held = sum(count for g, count in zip(order, least, strict=True) if self.bus_of[g] == b)
            left = np.array([self.limits.bus - ends], dtype=np.int64)
            rooms.append(int(_layers_within(left, bus.units.layers[0])[0]) - held)
        return rooms


def _layers_within(left: Ints, ticks: int) -> Ints:
    """Return how many layers of `ticks` each fit into what is left of a bus; -1 where less than nothing is left."""
    return np.where(left < 0, -1, left // ticks if ticks else INFINITE // 4)


def _is_bus_free(problem: Problem, device: int, limits: Limits) -> bool:
    """Return whether the whole model on one device keeps within the limit on its bus."""
    buses = [bus.units for bus in problem.buses if device in bus.devices]
    return limits.bus is None or all(sum(u.layers) + u.embedding + u.head <= limits.bus for u in buses)


def _capacity(problem: Problem, device: int, limits: Limits, *, embedding: bool, head: bool) -> int:
    """Most layers by memory and by the time limit on a stage; -1 where not even the ends fit."""
    fits = max_layers(problem, device, embedding=embedding, head=head)
    if limits.stage is None or fits < 0:
        return fits
    times = problem.devices[device].decode
    left = limits.stage - times.embedding * embedding - times.head * head
    if left < 0:
        return -1
    fits = min(fits, left // times.layers[0]) if times.layers[0] else fits
    return fits if fits >= problem.devices[device].rule.min_layers else -1
