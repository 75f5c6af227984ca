"""The integer program for layers that differ: one unit of flow through a graph of (device, layers done).

A node (g, p) means: layers [0, p) are done and a device of group g is at work. From there either layer p is computed on
the same device, or the hidden states hop to another one. Memory enters as the set of runs of layers that do not fit.
"""

from dataclasses import dataclass, field
from typing import Any

import pulp

from planner.groups import Group, are_alike, between, group_devices
from planner.problem import Assignment, Problem, StageChoice

Expression = Any
"""pulp ships no types."""


@dataclass(slots=True)
class LayersModel:
    """The program and the variables an answer is read from; g runs over groups, p over positions 0..num_layers."""

    problem: Problem
    groups: tuple[Group, ...]
    lp: Any
    unit: float
    """Solver time units per tick."""
    start: list[Any] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)
    single: list[Any] = field(default_factory=list)
    hold: list[list[Any]] = field(default_factory=list)
    hops: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    returns: dict[tuple[int, int], Any] = field(default_factory=dict)

    def arriving(self, g: int, p: int) -> Expression:
        """Hops into group g after p layers."""
        return pulp.lpSum(self.hops[p, a, g] for a in range(len(self.groups)) if (p, a, g) in self.hops)

    def departing(self, g: int, p: int) -> Expression:
        """Hops out of group g after p layers."""
        return pulp.lpSum(self.hops[p, g, b] for b in range(len(self.groups)) if (p, g, b) in self.hops)

    def switches(self, g: int, low: int, high: int) -> list[Any]:
        """Hops from one device of g to another at positions low..high; they end one stage and begin the next."""
        return [self.hops[p, g, g] for p in range(low, high + 1) if (p, g, g) in self.hops]

    def stages_on(self, g: int) -> Expression:
        """Number of stages on devices of group g."""
        positions = range(self.problem.num_layers + 1)
        return self.start[g] + pulp.lpSum(self.arriving(g, p) for p in positions)


def build_layers_model(problem: Problem, *, unit: float) -> LayersModel:
    """Write variables and constraints; `ilp_layers_goal.add_layers_goal` adds what is minimised."""
    model = LayersModel(problem, group_devices(problem), pulp.LpProblem("layers", pulp.LpMinimize), unit)
    _add_variables(model)
    _add_flow(model)
    _add_runs_that_do_not_fit(model)
    _add_return(model)
    _add_demands(model)
    return model


def _binary(lp: Any, name: str, *, can_be_one: bool = True) -> Any:
    return lp.add_variable(name, 0, int(can_be_one), pulp.LpInteger)


def _add_variables(model: LayersModel) -> None:
    problem, num_layers = model.problem, model.problem.num_layers
    for g, group in enumerate(model.groups):
        rule = problem.devices[group.first].rule
        is_free = not rule.is_banned
        # 1 if the embedding, the head, or the whole model is on a device of g
        model.start.append(_binary(model.lp, f"start_{g}", can_be_one=is_free and rule.embedding is not False))
        model.end.append(_binary(model.lp, f"end_{g}", can_be_one=is_free and rule.head is not False))
        fits_whole = problem.allows(group.first, 0, num_layers, embedding=True, head=True)
        model.single.append(_binary(model.lp, f"single_{g}", can_be_one=fits_whole))
        # 1 if layer l is on a device of g
        model.hold.append(
            [_binary(model.lp, f"hold_{g}_{x}", can_be_one=is_free and x not in rule.banned) for x in range(num_layers)]
        )
    for p in range(num_layers + 1):
        for a, b in _possible_pairs(model):
            if _may_leave(model, a, p) and _may_enter(model, b, p):
                # 1 if the path hops from a device of a to a device of b after p layers
                model.hops[p, a, b] = _binary(model.lp, f"hop_{p}_{a}_{b}")


def _possible_pairs(model: LayersModel) -> list[tuple[int, int]]:
    problem, groups = model.problem, model.groups
    pairs = [(a, b) for a in range(len(groups)) for b in range(len(groups)) if not problem.keep_order or a < b]
    return [(a, b) for a, b in pairs if between(problem.decode_hop, groups[a], groups[b]) is not None]


def _may_leave(model: LayersModel, g: int, p: int) -> bool:
    rule = model.problem.devices[model.groups[g].first].rule
    return not rule.is_banned and rule.head is not True and p >= max(rule.min_end or 0, rule.min_layers)


def _may_enter(model: LayersModel, g: int, p: int) -> bool:
    rule = model.problem.devices[model.groups[g].first].rule
    is_early = rule.max_start is None or p <= rule.max_start
    leaves_room = p + rule.min_layers <= model.problem.num_layers
    return not rule.is_banned and rule.embedding is not True and is_early and leaves_room


def _add_flow(model: LayersModel) -> None:
    lp, num_layers = model.lp, model.problem.num_layers
    lp += pulp.lpSum(model.start) == 1
    lp += pulp.lpSum(model.end) == 1
    for g, hold in enumerate(model.hold):
        for p in range(num_layers + 1):
            before = hold[p - 1] if p else model.start[g]
            after = hold[p] if p < num_layers else model.end[g]
            arriving, departing = model.arriving(g, p), model.departing(g, p)
            # What is at work on g after p layers arrived or was there, and leaves or stays.
            lp += before + arriving == after + departing
            # No empty stage in the middle: who arrives computes, who leaves has computed.
            lp += arriving <= after
            lp += departing <= before


def _add_runs_that_do_not_fit(model: LayersModel) -> None:
    """For every shortest run of layers that a device cannot hold: not all of it in one stage."""
    num_layers = model.problem.num_layers
    for g in range(len(model.groups)):
        low = 0
        for high in range(1, num_layers + 1):
            # [low, high) is the longest run ending at high that fits; one layer more at its front does not.
            first_fit = _first_fit(model, g, low, high)
            if first_fit > low:
                _forbid_run(model, g, first_fit - 1, high, embedding=False, head=False)
            low = first_fit
        prefix = next((p for p in range(num_layers + 1) if not _fits(model, g, 0, p, embedding=True)), None)
        if prefix is not None:
            _forbid_run(model, g, 0, prefix, embedding=True, head=False)
        starts = range(num_layers, -1, -1)
        suffix = next((p for p in starts if not _fits(model, g, p, num_layers, head=True)), None)
        if suffix is not None:
            _forbid_run(model, g, suffix, num_layers, embedding=False, head=True)


def _first_fit(model: LayersModel, g: int, low: int, high: int) -> int:
    while low < high and not _fits(model, g, low, high):
        low += 1
    return low


def _fits(model: LayersModel, g: int, low: int, high: int, *, embedding: bool = False, head: bool = False) -> bool:
    problem, device = model.problem, model.groups[g].first
    data = problem.devices[device]
    if data.rule.max_layers is not None and high - low > data.rule.max_layers:
        return False
    return problem.stage_bytes(device, low, high, embedding=embedding, head=head) <= data.limit_bytes


def _forbid_run(model: LayersModel, g: int, low: int, high: int, *, embedding: bool, head: bool) -> None:
    held = model.hold[g][low:high] + [model.start[g]] * embedding + [model.end[g]] * head
    first, last = low + (not embedding), high - (not head)
    model.lp += pulp.lpSum(held) - pulp.lpSum(model.switches(g, first, last)) <= len(held) - 1


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
        model.lp += lasts + model.single[g] == model.end[g]
        model.lp += firsts + model.single[g] == model.start[g]
    # There are no hops exactly if one device holds everything.
    num_hops, is_single = pulp.lpSum(model.hops.values()), pulp.lpSum(model.single)
    model.lp += num_hops >= 1 - is_single
    model.lp += num_hops <= model.problem.num_devices * (1 - is_single)


def _add_demands(model: LayersModel) -> None:
    problem, lp = model.problem, model.lp
    for g, group in enumerate(model.groups):
        rule = problem.devices[group.first].rule
        # At most one stage per device; all of them where it is demanded.
        lp += model.stages_on(g) <= group.size
        if problem.use_all or rule.is_required:
            lp += model.stages_on(g) == group.size
        if rule.min_layers:
            _add_least_layers(model, g, rule.min_layers)
    if problem.max_stages is not None:
        lp += pulp.lpSum(model.stages_on(g) for g in range(len(model.groups))) <= problem.max_stages
    if problem.keep_order and not problem.use_all:
        # Of two neighbours that are alike, the first is used first.
        for g in range(len(model.groups) - 1):
            if are_alike(problem, model.groups[g].first, model.groups[g + 1].first):
                lp += model.stages_on(g) >= model.stages_on(g + 1)


def _add_least_layers(model: LayersModel, g: int, least: int) -> None:
    num_layers = model.problem.num_layers
    for p in range(num_layers + 1):
        too_early = [model.departing(g, q) for q in range(p + 1, min(p + least, num_layers + 1))]
        model.lp += model.arriving(g, p) + pulp.lpSum(too_early) <= 1
    early = [model.departing(g, q) for q in range(min(least, num_layers + 1))]
    model.lp += model.start[g] + pulp.lpSum(early) <= 1
    if least > num_layers:
        model.lp += model.start[g] == 0


def read_layers(model: LayersModel) -> Assignment:
    """Follow the flow; rounding is safe, the answer is checked afterwards."""
    here = next(g for g, start in enumerate(model.start) if _is_one(start))
    free = [list(group.members) for group in model.groups]
    switches = {(p, a): b for (p, a, b), hop in model.hops.items() if _is_one(hop)}
    stages: list[StageChoice] = []
    begin = 0
    for p in range(model.problem.num_layers + 1):
        onward = switches.get((p, here))
        if onward is not None:
            stages.append(StageChoice(free[here].pop(0), begin, p))
            here, begin = onward, p
    stages.append(StageChoice(free[here].pop(0), begin, model.problem.num_layers))
    return tuple(stages)


def _is_one(variable: Any) -> bool:
    return round(variable.varValue or 0) == 1
