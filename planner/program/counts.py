"""The integer program for identical layers: how many layers each device holds, and the path through the devices.

Which layers a stage holds does not matter here, only how many. Interchangeable devices form one node of the graph that
the path may visit several times, so 64 devices of 4 kinds are 4 nodes, not 64.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pulp

from planner.problem.goal import Goal
from planner.problem.groups import Group, are_alike, between, group_devices, least_share
from planner.problem.problem import (
    Assignment,
    ChainCosts,
    Problem,
    StageChoice,
    UnitTicks,
    bus_costs,
    chain_costs,
    is_pipelined,
    max_layers,
    queue_costs,
)
from planner.program.goal import Expression, add_goal


@dataclass(slots=True)
class CountsModel:
    """The program and the variables an answer is read from; all lists run over the groups of devices."""

    problem: Problem
    groups: tuple[Group, ...]
    lp: Any
    unit: float
    """Solver time units per tick."""
    first: list[Any] = field(default_factory=list)
    last: list[Any] = field(default_factory=list)
    single: list[Any] = field(default_factory=list)
    first_layers: list[Any] = field(default_factory=list)
    last_layers: list[Any] = field(default_factory=list)
    used: list[list[Any]] = field(default_factory=list)
    layers: list[list[Any]] = field(default_factory=list)
    arcs: dict[tuple[int, int], Any] = field(default_factory=dict)
    returns: dict[tuple[int, int], Any] = field(default_factory=dict)


def build_counts_model(problem: Problem, *, unit: float) -> CountsModel:
    """Write variables and constraints; `add_counts_goal` adds what is minimised.

    `unit` scales ticks to numbers of ordinary size (milliseconds, as a rule).
    """
    model = CountsModel(problem, group_devices(problem), pulp.LpProblem("counts", pulp.LpMinimize), unit)
    _add_variables(model)
    _add_one_path(model)
    _add_capacities(model)
    _add_all_layers(model)
    _add_connection(model)
    _add_return(model)
    _add_symmetry(model)
    _add_demands(model)
    return model


def binary(lp: Any, name: str, *, can_be_one: bool = True) -> Any:
    """Add a 0/1 variable; one that cannot be 1 is fixed."""
    return lp.add_variable(name, 0, int(can_be_one), pulp.LpInteger)


def _integer(lp: Any, name: str, upper: int) -> Any:
    return lp.add_variable(name, 0, max(upper, 0), pulp.LpInteger)


def _capacity(model: CountsModel, g: int, *, embedding: bool, head: bool) -> int:
    return max_layers(model.problem, model.groups[g].first, embedding=embedding, head=head)


def _add_variables(model: CountsModel) -> None:
    problem, num_layers = model.problem, model.problem.num_layers
    for g, group in enumerate(model.groups):
        first, last = (_capacity(model, g, embedding=e, head=not e) for e in (True, False))
        middle = _capacity(model, g, embedding=False, head=False)
        whole = _capacity(model, g, embedding=True, head=True)
        rule = problem.devices[group.first].rule
        # 1 if the first stage (embedding), the last stage (head), or the only stage is on a device of g
        model.first.append(binary(model.lp, f"first_{g}", can_be_one=first >= 0))
        model.last.append(binary(model.lp, f"last_{g}", can_be_one=last >= 0))
        model.single.append(binary(model.lp, f"single_{g}", can_be_one=whole >= num_layers >= rule.min_layers))
        # layers held by the first and by the last stage, if they are on g [layers]
        model.first_layers.append(_integer(model.lp, f"first_layers_{g}", first))
        model.last_layers.append(_integer(model.lp, f"last_layers_{g}", last))
        # 1 if the i-th middle stage of g exists, and the layers it holds [layers]
        model.used.append([binary(model.lp, f"used_{g}_{i}", can_be_one=middle > 0) for i in range(group.size)])
        model.layers.append([_integer(model.lp, f"layers_{g}_{i}", middle) for i in range(group.size)])
    for a, b in _possible_arcs(model):
        # how often the path goes from a device of a to a device of b [hops]
        model.arcs[a, b] = _integer(
            model.lp, f"arc_{a}_{b}", min(model.groups[a].size - (a == b), model.groups[b].size)
        )


def _possible_arcs(model: CountsModel) -> list[tuple[int, int]]:
    problem, groups = model.problem, model.groups
    pairs = [(a, b) for a in range(len(groups)) for b in range(len(groups)) if not problem.keep_order or a < b]
    if problem.keep_order and problem.use_all:
        pairs = list(pairwise(range(len(groups))))
    return [(a, b) for a, b in pairs if between(problem.decode_hop, groups[a], groups[b]) is not None]


def _add_one_path(model: CountsModel) -> None:
    lp, groups = model.lp, range(len(model.groups))
    # One stage alone, or one first and one last stage.
    lp += pulp.lpSum(model.single) + pulp.lpSum(model.first) == 1
    lp += pulp.lpSum(model.last) == pulp.lpSum(model.first)
    for g in groups:
        # The path leaves every stage but the last, and enters every stage but the first.
        leaving = [arc for (a, _), arc in model.arcs.items() if a == g]
        entering = [arc for (_, b), arc in model.arcs.items() if b == g]
        lp += pulp.lpSum(leaving) == model.first[g] + pulp.lpSum(model.used[g])
        lp += pulp.lpSum(entering) == model.last[g] + pulp.lpSum(model.used[g])
        # At most one stage per device.
        lp += _stages_on(model, g) <= model.groups[g].size


def _stages_on(model: CountsModel, g: int) -> Expression:
    return pulp.lpSum([model.first[g], model.last[g], model.single[g], *model.used[g]])


def _add_capacities(model: CountsModel) -> None:
    for g, group in enumerate(model.groups):
        # Memory, as exact integer capacities: layers <= what fits beside the units the stage has at its ends.
        least = model.problem.devices[group.first].rule.min_layers
        ends = ((model.first, model.first_layers, True), (model.last, model.last_layers, False))
        for is_there, layers, embedding in ends:
            capacity = max(_capacity(model, g, embedding=embedding, head=not embedding), 0)
            model.lp += layers[g] <= capacity * is_there[g]
            model.lp += layers[g] >= least * is_there[g]
        middle = max(_capacity(model, g, embedding=False, head=False), 0)
        for is_used, count in zip(model.used[g], model.layers[g], strict=True):
            model.lp += count <= middle * is_used
            model.lp += count >= max(least, 1) * is_used  # a middle stage is never empty


def _layers_on(model: CountsModel, g: int) -> Expression:
    return pulp.lpSum([model.first_layers[g], model.last_layers[g], *model.layers[g]])


def _add_all_layers(model: CountsModel) -> None:
    # Every layer exactly once.
    num_layers = model.problem.num_layers
    counts = [_layers_on(model, g) for g in range(len(model.groups))]
    model.lp += pulp.lpSum(counts) + num_layers * pulp.lpSum(model.single) == num_layers


def _add_connection(model: CountsModel) -> None:
    """Forbid cycles beside the path: what is carried along an arc are the layers still to be placed.

    Every stage on a cycle consumes at least one layer, and nothing ever comes in.
    """
    if model.problem.keep_order or len(model.groups) == 1:
        return
    num_layers = model.problem.num_layers
    # layers still to be placed after the hop [layers]
    carried = {
        (a, b): model.lp.add_variable(f"carried_{a}_{b}", 0, num_layers * arc.upBound)
        for (a, b), arc in model.arcs.items()
        if a != b
    }
    for pair, flow in carried.items():
        model.lp += flow <= num_layers * model.arcs[pair]
    for g in range(len(model.groups)):
        arriving = pulp.lpSum(flow for (_, b), flow in carried.items() if b == g)
        departing = pulp.lpSum(flow for (a, _), flow in carried.items() if a == g)
        model.lp += arriving + num_layers * model.first[g] == _layers_on(model, g) + departing
    for (a, b), arc in model.arcs.items():
        if a < b and (b, a) in model.arcs and model.groups[a].size == model.groups[b].size == 1:
            model.lp += arc + model.arcs[b, a] <= 1


def _add_return(model: CountsModel) -> None:
    """Tie the way back to the pair of last and first stage; a pair without one cannot be chosen."""
    groups = model.groups
    pairs = [(a, b) for a in range(len(groups)) for b in range(len(groups)) if a != b or groups[a].size > 1]
    # 1 if the last stage is on a and the first on b
    model.returns = {
        (a, b): model.lp.add_variable(
            f"return_{a}_{b}", 0, int(between(model.problem.return_hop, groups[a], groups[b]) is not None)
        )
        for a, b in pairs
    }
    for g in range(len(groups)):
        model.lp += pulp.lpSum(chosen for (a, _), chosen in model.returns.items() if a == g) == model.last[g]
        model.lp += pulp.lpSum(chosen for (_, b), chosen in model.returns.items() if b == g) == model.first[g]


def _add_symmetry(model: CountsModel) -> None:
    """Keep one of the many equal answers: stages of a group in order of size, the earlier of two twins first."""
    for g in range(len(model.groups)):
        for i in range(model.groups[g].size - 1):
            model.lp += model.used[g][i] >= model.used[g][i + 1]
            model.lp += model.layers[g][i] >= model.layers[g][i + 1]
    if model.problem.keep_order and not model.problem.use_all:
        for a, b in pairwise(range(len(model.groups))):
            if are_alike(model.problem, model.groups[a].first, model.groups[b].first):
                model.lp += _stages_on(model, a) >= _stages_on(model, b)


def _add_demands(model: CountsModel) -> None:
    problem = model.problem
    for g, group in enumerate(model.groups):
        # Devices that must be used.
        if problem.use_all or problem.devices[group.first].rule.is_required:
            model.lp += _stages_on(model, g) == group.size
    if problem.max_stages is not None:
        stages = [_stages_on(model, g) for g in range(len(model.groups))]
        model.lp += pulp.lpSum(stages) <= problem.max_stages


def read_counts(model: CountsModel) -> Assignment:
    """Read the path and the layers off the solved variables; rounding is safe, the answer is checked afterwards."""
    alone = [g for g, single in enumerate(model.single) if _value(single)]
    if alone:
        return (StageChoice(model.groups[alone[0]].first, 0, model.problem.num_layers),)
    waiting = [
        [c for u, c in zip(map(_value, used), map(_value, layers), strict=True) if u]
        for used, layers in zip(model.used, model.layers, strict=True)
    ]
    walk = _walk(model)
    free = [list(group.members) for group in model.groups]
    stages: list[StageChoice] = []
    position = 0
    for index, g in enumerate(walk):
        if index == 0:
            count = _value(model.first_layers[g])
        elif index == len(walk) - 1:
            count = _value(model.last_layers[g])
        else:
            count = waiting[g].pop(0)
        stages.append(StageChoice(free[g].pop(0), position, position + count))
        position += count
    return tuple(stages)


def _value(variable: Any) -> int:
    return round(variable.varValue or 0)


def _walk(model: CountsModel) -> list[int]:
    """Return the groups in the order the path visits them: an Eulerian walk over the chosen arcs (Hierholzer)."""
    left = {pair: _value(arc) for pair, arc in model.arcs.items()}
    start = next(g for g, first in enumerate(model.first) if _value(first))
    stack, walk = [start], []
    while stack:
        here = stack[-1]
        onward = next((b for (a, b), n in left.items() if a == here and n), None)
        if onward is None:
            walk.append(stack.pop())
        else:
            left[here, onward] -= 1
            stack.append(onward)
    return walk[::-1]


def add_counts_goal(model: CountsModel, goal: Goal) -> None:
    """Add the objective, and the limit on the first key where the share is the second."""
    add_goal(model.lp, goal, unit=model.unit, time=lambda: _time(model, goal), share=lambda: _largest_share(model))


def _largest_share(model: CountsModel) -> Expression:
    # largest used/budget over the stages [1]
    share = model.lp.add_variable("share", least_share(model.problem, model.groups), 1)
    _bound_share(model, share)
    return share


def _time(model: CountsModel, goal: Goal) -> Expression:
    costs = chain_costs(model.problem, goal.objective)
    chain = _chain_time(model, costs)
    if is_pipelined(model.problem, goal.objective):
        return chain + _longest_queue(model)
    if goal.objective != "throughput":
        return chain
    # step period times the requests in flight: the slowest of the stages, the hops and the whole cycle [time]
    period = model.lp.add_variable("period", 0)
    in_flight = model.problem.requests_in_flight
    model.lp += period >= chain
    # Everything that is read through one memory bus in a step, one after the other.
    for costs_on_bus in bus_costs(model.problem):
        model.lp += period >= in_flight * pulp.lpSum(_stage_times(model, costs_on_bus))
    for stage in _stage_times(model, costs.units):
        model.lp += period >= in_flight * stage
    for pair, arc in model.arcs.items():
        hop = between(costs.hop, *(model.groups[g] for g in pair)) or 0
        is_used = arc
        if arc.upBound > 1:
            is_used = binary(model.lp, f"hop_used_{pair[0]}_{pair[1]}")
            model.lp += arc <= arc.upBound * is_used
        model.lp += period >= in_flight * hop * model.unit * is_used
    for ticks, chosen in _back_choices(model, costs):
        model.lp += period >= in_flight * ticks * model.unit * chosen
    return period


def _longest_queue(model: CountsModel) -> Any:
    # what the slowest stage adds to a pipelined prefill [time]
    queue = model.lp.add_variable("queue", 0)
    for stage in _stage_times(model, queue_costs(model.problem)):
        model.lp += queue >= stage
    return queue


def _chain_time(model: CountsModel, costs: ChainCosts) -> Expression:
    terms = _stage_times(model, costs.units)
    for (a, b), arc in model.arcs.items():
        terms.append((between(costs.hop, model.groups[a], model.groups[b]) or 0) * model.unit * arc)
    terms += [ticks * model.unit * chosen for ticks, chosen in _back_choices(model, costs)]
    return pulp.lpSum(terms)


def _back_choices(model: CountsModel, costs: ChainCosts) -> list[tuple[int, Any]]:
    """(ticks, 0/1 expression) for every way back; the expressions sum to one."""
    groups = model.groups
    alone = [(costs.back[g.first][g.first] or 0, single) for g, single in zip(groups, model.single, strict=True)]
    pairs = [(between(costs.back, groups[a], groups[b]) or 0, c) for (a, b), c in model.returns.items()]
    return alone + pairs


def _stage_times(model: CountsModel, costs: tuple[UnitTicks, ...]) -> list[Expression]:
    """The time of every stage there may be; zero for those that are not there."""
    times: list[Expression] = []
    for g, group in enumerate(model.groups):
        units = costs[group.first]
        layer, embedding, head = (ticks * model.unit for ticks in (units.layers[0], units.embedding, units.head))
        times.append(embedding * model.first[g] + layer * model.first_layers[g])
        times.append(head * model.last[g] + layer * model.last_layers[g])
        times.append((embedding + head + layer * model.problem.num_layers) * model.single[g])
        times += [layer * count for count in model.layers[g]]
    return times


def _bound_share(model: CountsModel, share: Any) -> None:
    """share >= used / budget for every stage; the workspace is the largest over the kinds of unit it holds."""
    problem, units, num_layers = model.problem, model.problem.units, model.problem.num_layers
    for g, group in enumerate(model.groups):
        device = problem.devices[group.first]
        budget = device.budget_bytes
        whole = problem.stage_bytes(group.first, 0, num_layers, embedding=True, head=True)
        model.lp += share >= whole / budget * model.single[g]
        fixed = device.overhead_bytes
        # Stages of a group come in order of size: the first middle one is the largest.
        model.lp += (
            share
            >= (fixed + units.layer_activation) / budget * model.used[g][0]
            + (units.layers[0] / budget) * model.layers[g][0]
        )
        for is_there, layers, name, size, workspace in (
            (model.first[g], model.first_layers[g], "first", units.embedding, units.embedding_activation),
            (model.last[g], model.last_layers[g], "last", units.head, units.head_activation),
        ):
            held = units.layers[0] / budget * layers
            model.lp += share >= (fixed + size + workspace) / budget * is_there + held
            if units.layer_activation > workspace:
                # 1 if the stage at this end holds layers at all
                has_layers = binary(model.lp, f"{name}_has_layers_{g}")
                model.lp += layers <= num_layers * has_layers
                extra = (units.layer_activation - workspace) / budget * has_layers
                model.lp += share >= (fixed + size + workspace) / budget * is_there + held + extra
