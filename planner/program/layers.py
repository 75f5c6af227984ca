"""The integer program for layers that differ: a path through positions of the model, one segment per stage.

A stage is a segment, layers [start, end) on a device; only segments that fit the device's memory and rules get a
variable, so memory is exact whatever the solver rounds. Between two segments lies a hop at the position where one ends
and the next starts. Interchangeable devices share their variables.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import pulp

from planner.problem.goal import Goal
from planner.problem.groups import Group, are_alike, between, group_devices
from planner.problem.problem import (
    Assignment,
    ChainCosts,
    Problem,
    StageChoice,
    UnitTicks,
    bus_costs,
    chain_costs,
    is_pipelined,
    queue_costs,
)
from planner.program.goal import Expression, add_goal


@dataclass(frozen=True, slots=True)
class Segment:
    """One possible stage on a device of group `group`."""

    group: int
    start: int
    end: int
    embedding: bool
    head: bool


@dataclass(slots=True)
class LayersModel:
    """The program and the variables an answer is read from."""

    problem: Problem
    groups: tuple[Group, ...]
    lp: Any
    unit: float
    """Solver time units per tick."""
    segments: dict[Segment, Any] = field(default_factory=dict)
    hops: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    """By (position, from group, to group)."""
    returns: dict[tuple[int, int], Any] = field(default_factory=dict)

    def chosen(self, *, group: int, embedding: bool | None = None, head: bool | None = None) -> Expression:
        """The number of stages on a group, with or without the ends."""
        return pulp.lpSum(
            variable
            for s, variable in self.segments.items()
            if s.group == group and embedding in (None, s.embedding) and head in (None, s.head)
        )


def build_layers_model(problem: Problem, *, unit: float) -> LayersModel:
    """Write variables and constraints; `add_layers_goal` adds what is minimised."""
    model = LayersModel(problem, group_devices(problem), pulp.LpProblem("layers", pulp.LpMinimize), unit)
    _add_variables(model)
    _add_one_path(model)
    _add_return(model)
    _add_demands(model)
    return model


def _add_variables(model: LayersModel) -> None:
    # 1 if a device of the group holds exactly this segment
    for segment in sorted(_fitting_segments(model), key=lambda s: (s.group, s.start, s.end, s.embedding, s.head)):
        kind = "first" * segment.embedding + "last" * segment.head or "middle"
        name = f"{kind}_{segment.group}_{segment.start}_{segment.end}"
        model.segments[segment] = model.lp.add_variable(name, 0, 1, pulp.LpInteger)
    leaving = {(s.group, s.end) for s in model.segments if not s.head}
    entering = {(s.group, s.start) for s in model.segments if not s.embedding}
    for p in range(model.problem.num_layers + 1):
        for a, b in _possible_pairs(model):
            if (a, p) in leaving and (b, p) in entering:
                # 1 if the path hops from a device of a to a device of b after p layers
                model.hops[p, a, b] = model.lp.add_variable(f"hop_{p}_{a}_{b}", 0, 1, pulp.LpInteger)


def _fitting_segments(model: LayersModel) -> Iterator[Segment]:
    """Memory as the set of segments that fit: an exact integer comparison for each."""
    problem, size = model.problem, model.problem.num_layers
    for g, group in enumerate(model.groups):
        limit = problem.devices[group.first].limit_bytes
        for start in range(size + 1):
            for end in range(start, size + 1):
                if problem.stage_bytes(group.first, start, end, embedding=False, head=False) > limit:
                    break  # more layers need more
                for embedding, head in product((False, True), repeat=2):
                    is_placed = (start == 0 or not embedding) and (end == size or not head)
                    is_empty = start == end and not (embedding or head)
                    if not is_placed or is_empty:
                        continue
                    if problem.allows(group.first, start, end, embedding=embedding, head=head):
                        yield Segment(g, start, end, embedding, head)


def _possible_pairs(model: LayersModel) -> list[tuple[int, int]]:
    problem, groups = model.problem, model.groups
    pairs = [(a, b) for a in range(len(groups)) for b in range(len(groups)) if not problem.keep_order or a < b]
    return [(a, b) for a, b in pairs if between(problem.decode_hop, groups[a], groups[b]) is not None]


def _add_one_path(model: LayersModel) -> None:
    lp = model.lp
    # One stage has the embedding, one the head.
    lp += pulp.lpSum(v for s, v in model.segments.items() if s.embedding) == 1
    lp += pulp.lpSum(v for s, v in model.segments.items() if s.head) == 1
    leaving: dict[tuple[int, int], list[Any]] = {}
    entering: dict[tuple[int, int], list[Any]] = {}
    for segment, variable in model.segments.items():
        if not segment.head:
            leaving.setdefault((segment.group, segment.end), []).append(variable)
        if not segment.embedding:
            entering.setdefault((segment.group, segment.start), []).append(variable)
    for (p, a, b), hop in model.hops.items():
        leaving.setdefault((a, p), []).append(-hop)
        entering.setdefault((b, p), []).append(-hop)
    # A stage that ends before the head hops on; a stage that starts after the embedding was hopped to.
    for balance in (*leaving.values(), *entering.values()):
        lp += pulp.lpSum(balance) == 0


def _add_return(model: LayersModel) -> None:
    """Tie the way back to the pair of last and first stage; a pair without one cannot be chosen."""
    groups, back = model.groups, model.problem.return_hop
    for a in range(len(groups)):
        for b in range(len(groups)):
            if a != b or groups[a].size > 1:
                # 1 if the last stage is on a and the first, another one, on b
                can_be = between(back, groups[a], groups[b]) is not None
                model.returns[a, b] = model.lp.add_variable(f"return_{a}_{b}", 0, int(can_be))
    for g in range(len(groups)):
        lasts = pulp.lpSum(chosen for (a, _), chosen in model.returns.items() if a == g)
        firsts = pulp.lpSum(chosen for (_, b), chosen in model.returns.items() if b == g)
        model.lp += lasts == model.chosen(group=g, embedding=False, head=True)
        model.lp += firsts == model.chosen(group=g, embedding=True, head=False)


def _add_demands(model: LayersModel) -> None:
    problem, lp = model.problem, model.lp
    stages = [model.chosen(group=g) for g in range(len(model.groups))]
    for g, group in enumerate(model.groups):
        # At most one stage per device; all of them where it is demanded.
        lp += stages[g] <= group.size
        if problem.use_all or problem.devices[group.first].rule.is_required:
            lp += stages[g] == group.size
    if problem.max_stages is not None:
        lp += pulp.lpSum(stages) <= problem.max_stages
    if problem.keep_order and not problem.use_all:
        # Of two neighbours that are alike, the first is used first.
        for a, b in pairwise(range(len(model.groups))):
            if are_alike(problem, model.groups[a].first, model.groups[b].first):
                lp += stages[a] >= stages[b]


def read_layers(model: LayersModel) -> Assignment:
    """Line the chosen segments up; rounding is safe, the answer is checked afterwards."""
    free = [list(group.members) for group in model.groups]
    chosen = [segment for segment, variable in model.segments.items() if round(variable.varValue or 0) == 1]
    # Of two segments at the same place the empty one with the embedding comes first, the one with the head last.
    chosen.sort(key=lambda s: (s.start, s.end, not s.embedding, s.head))
    return tuple(StageChoice(free[s.group].pop(0), s.start, s.end) for s in chosen)


def add_layers_goal(model: LayersModel, goal: Goal) -> None:
    """Add the objective, and the limit on the first key where the share is the second."""
    add_goal(model.lp, goal, unit=model.unit, time=lambda: _time(model, goal), share=lambda: _largest_share(model))


def _largest_share(model: LayersModel) -> Expression:
    # largest used/budget over the stages [1]
    share = model.lp.add_variable("share", 0, 1)
    _bound_stages(model, share, lambda s: _share_of(model, s))
    return share


def _time(model: LayersModel, goal: Goal) -> Expression:
    problem, groups = model.problem, model.groups
    costs = chain_costs(problem, goal.objective)
    chain = _chain_time(model, costs)
    if is_pipelined(problem, goal.objective):
        # what the slowest stage adds to a pipelined prefill [time]
        queue, waits = model.lp.add_variable("queue", 0), queue_costs(problem)
        _bound_stages(model, queue, lambda s: model.unit * _ticks(waits[groups[s.group].first], s))
        return chain + queue
    if goal.objective != "throughput":
        return chain
    # step period times the requests in flight: the slowest of the stages, the hops and the whole cycle [time]
    period = model.lp.add_variable("period", 0)
    weight = problem.requests_in_flight * model.unit
    model.lp += period >= chain
    # Everything that is read through one memory bus in a step, one after the other.
    for on_bus in bus_costs(problem):
        busy = [_ticks(on_bus[groups[s.group].first], s) * chosen for s, chosen in model.segments.items()]
        model.lp += period >= weight * pulp.lpSum(busy)
    _bound_stages(model, period, lambda s: weight * _ticks(costs.units[groups[s.group].first], s))
    for p in range(problem.num_layers + 1):
        # Stages between the ends are never empty, so at most one hop happens at a position.
        model.lp += period >= weight * pulp.lpSum(_hop_times(model, costs, p))
    model.lp += period >= weight * pulp.lpSum(_back_times(model, costs))
    return period


def _hop_times(model: LayersModel, costs: ChainCosts, p: int) -> list[Expression]:
    groups = model.groups
    return [(between(costs.hop, groups[a], groups[b]) or 0) * hop for (q, a, b), hop in model.hops.items() if p == q]


def _back_times(model: LayersModel, costs: ChainCosts) -> list[Expression]:
    groups = model.groups
    alone = [
        (costs.back[group.first][group.first] or 0) * model.chosen(group=g, embedding=True, head=True)
        for g, group in enumerate(groups)
    ]
    return alone + [(between(costs.back, groups[a], groups[b]) or 0) * c for (a, b), c in model.returns.items()]


def _chain_time(model: LayersModel, costs: ChainCosts) -> Expression:
    groups = model.groups
    terms = [_ticks(costs.units[groups[s.group].first], s) * chosen for s, chosen in model.segments.items()]
    for p in range(model.problem.num_layers + 1):
        terms += _hop_times(model, costs, p)
    return model.unit * pulp.lpSum(terms + _back_times(model, costs))


def _ticks(times: UnitTicks, segment: Segment) -> int:
    ends = times.embedding * segment.embedding + times.head * segment.head
    return sum(times.layers[segment.start : segment.end]) + ends


def _share_of(model: LayersModel, s: Segment) -> float:
    device = model.groups[s.group].first
    used = model.problem.stage_bytes(device, s.start, s.end, embedding=s.embedding, head=s.head)
    return used / model.problem.devices[device].budget_bytes


def _bound_stages(model: LayersModel, limit: Any, weight_of: Callable[[Segment], float]) -> None:
    """limit >= weight of every stage.

    Exactly one stage covers each layer, so the weights of all segments over a layer may be added up.
    """
    covering: list[list[Expression]] = [[] for _ in range(model.problem.num_layers)]
    for segment, chosen in model.segments.items():
        weighted = weight_of(segment) * chosen
        for layer in range(segment.start, segment.end):
            covering[layer].append(weighted)
        if segment.start == segment.end:
            model.lp += limit >= weighted
    for terms in covering:
        model.lp += limit >= pulp.lpSum(terms)
