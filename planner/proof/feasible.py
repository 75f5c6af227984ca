"""Is there any plan at all? Answered fast and exactly, so that "what would make it fit" can ask hundreds of times.

Only memory, rules and connections matter, no times. Where every device reaches every other and the order is free, a
chain exists exactly if there is room (identical layers) or if the farthest layer the devices can reach one after the
other is the last one (layers that differ). Everything else is left to the exact methods of the certificate.
"""

from dataclasses import replace
from math import prod

import numpy as np

from planner.problem.groups import Group, group_devices, has_room
from planner.problem.problem import Matrix, Problem, UnitTicks, chain_costs
from planner.proof.certificate import method_for, search_for
from planner.proof.tables import Ints, Limits, all_counts

_MOST_STATES = 2_000_000


def has_plan(problem: Problem) -> bool | None:
    """Return whether an assignment exists; None where no exact method reaches."""
    bare = _without_times(problem)
    if _is_simple(bare):
        groups = group_devices(bare)
        if bare.has_identical_layers:
            return has_room(bare, groups)
        if prod(group.size + 1 for group in groups) <= _MOST_STATES:
            return _reaches_the_end(bare, groups)
    if method_for(bare) is None:
        return None
    return search_for(bare, chain_costs(bare, "latency")).cheapest(bare, Limits()) is not None


def _without_times(problem: Problem) -> Problem:
    """Forget all times, which makes more devices interchangeable."""
    nothing = UnitTicks(0, (0,) * problem.num_layers, 0)
    devices = tuple(replace(device, decode=nothing, prefill=()) for device in problem.devices)
    return replace(
        problem,
        devices=devices,
        decode_hop=_without_ticks(problem.decode_hop),
        return_hop=_without_ticks(problem.return_hop),
        prefill_hop=(),
    )


def _without_ticks(matrix: Matrix) -> Matrix:
    return tuple(tuple(None if cell is None else 0 for cell in row) for row in matrix)


def _is_simple(problem: Problem) -> bool:
    """Whether any set of devices in any order is allowed."""
    rules = [device.rule for device in problem.devices]
    is_free = not (problem.keep_order or problem.use_all or problem.max_stages is not None)
    is_unruled = not any(rule.is_required or rule.is_positional or rule.min_layers for rule in rules)
    num = problem.num_devices
    pairs = [(a, b) for a in range(num) for b in range(num) if a != b]
    is_connected = all(problem.decode_hop[a][b] is not None for a, b in pairs)
    comes_back = all(cell is not None for row in problem.return_hop for cell in row)
    return is_free and is_unruled and is_connected and comes_back


def _reaches_the_end(problem: Problem, groups: tuple[Group, ...]) -> bool:
    """Held-Karp over the farthest layer that a set of devices can reach; farther is never worse."""
    num_layers = problem.num_layers
    if any(problem.allows(g.first, 0, num_layers, embedding=True, head=True) for g in groups):
        return True
    counts, strides = all_counts([group.size for group in groups])
    farthest = np.full(len(counts), -1, dtype=np.int64)
    ends = [_farthest_ends(problem, group.first) for group in groups]
    starts = [_earliest_start(problem, group.first) for group in groups]
    totals = counts.sum(axis=1)
    for g, group in enumerate(groups):
        farthest[strides[g]] = _farthest_first(problem, group.first)
    for level in range(2, int(totals.max()) + 1):
        for g in range(len(groups)):
            here = np.flatnonzero((totals == level) & (counts[:, g] > 0))
            before = farthest[here - strides[g]]
            if np.any((before >= 0) & (before >= starts[g])):
                return True
            reached = np.where(before >= 0, ends[g][np.maximum(before, 0)], -1)
            farthest[here] = np.maximum(farthest[here], reached)
    return False


def _farthest_first(problem: Problem, device: int) -> int:
    fitting = [p for p in range(problem.num_layers + 1) if problem.allows(device, 0, p, embedding=True, head=False)]
    return max(fitting, default=-1)


def _earliest_start(problem: Problem, device: int) -> int:
    size = problem.num_layers
    fitting = [p for p in range(size + 1) if problem.allows(device, p, size, embedding=False, head=True)]
    return min(fitting, default=size + 1)


def _farthest_ends(problem: Problem, device: int) -> Ints:
    """For every start the farthest end of a stage without ends; the start itself if no layer fits."""
    ends, end = [], 0
    for start in range(problem.num_layers + 1):
        end = max(end, start)
        while end < problem.num_layers and problem.allows(device, start, end + 1, embedding=False, head=False):
            end += 1
        ends.append(end)
    return np.array(ends, dtype=np.int64)
