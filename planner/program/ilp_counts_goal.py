"""What the program for identical layers minimises: times and memory shares over the counts of `ilp_counts`."""

from typing import Any

import pulp

from planner.problem.goal import Goal
from planner.problem.groups import between
from planner.problem.problem import ChainCosts, UnitTicks, chain_costs, is_pipelined, queue_costs
from planner.problem.share_bound import least_share
from planner.program.counts import CountsModel, Expression, binary


def add_counts_goal(model: CountsModel, goal: Goal) -> None:
    """Add the objective, and the limit on the first key where the share is the second."""
    time = _time(model, goal) if goal.kind != "share" or goal.max_time is not None else pulp.LpAffineExpression()
    if goal.max_time is not None:
        # The first key may not get worse; the margin is the solver's own accuracy, the answer is checked exactly.
        model.lp += time <= goal.max_time * model.unit * (1 + 1e-9)
    if goal.kind == "time":
        model.lp.setObjective(time)
        return
    # largest used/budget over the stages [1]
    share = model.lp.add_variable("share", least_share(model.problem, model.groups), 1)
    _bound_share(model, share)
    if goal.kind == "share":
        model.lp.setObjective(100 * share)
        return
    weight = float(goal.weight)
    time_scale = 100 * weight / (goal.best_time * model.unit) if goal.best_time else 0.0
    share_scale = 100 * (1 - weight) / float(goal.best_share) if goal.best_share else 0.0
    model.lp.setObjective(time_scale * time + share_scale * share)


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
