"""What the program for differing layers minimises: times and memory shares over the flow of `ilp_layers`."""

from typing import Any

import pulp

from planner.goal import Goal
from planner.groups import between
from planner.ilp_layers import Expression, LayersModel
from planner.problem import ChainCosts, UnitTicks, chain_costs, is_pipelined, queue_costs


def add_layers_goal(model: LayersModel, goal: Goal) -> None:
    """Add the objective, and the limit on the first key where the share is the second."""
    time = _time(model, goal) if goal.kind != "share" or goal.max_time is not None else pulp.LpAffineExpression()
    if goal.max_time is not None:
        model.lp += time <= goal.max_time * model.unit * (1 + 1e-9)
    if goal.kind == "time":
        model.lp.setObjective(time)
        return
    # largest used/budget over the stages [1]
    share = model.lp.add_variable("share", 0, 1)
    for g in range(len(model.groups)):
        _bound_share(model, g, share)
    if goal.kind == "share":
        model.lp.setObjective(100 * share)
        return
    weight = float(goal.weight)
    time_scale = 100 * weight / (goal.best_time * model.unit) if goal.best_time else 0.0
    share_scale = 100 * (1 - weight) / float(goal.best_share) if goal.best_share else 0.0
    model.lp.setObjective(time_scale * time + share_scale * share)


def _time(model: LayersModel, goal: Goal) -> Expression:
    costs = chain_costs(model.problem, goal.objective)
    chain = _chain_time(model, costs)
    if is_pipelined(model.problem, goal.objective):
        # what the slowest stage adds to a pipelined prefill [time]
        queue = model.lp.add_variable("queue", 0)
        for g, times in enumerate(queue_costs(model.problem)[group.first] for group in model.groups):
            _bound_stage_times(model, g, times, queue, model.unit)
        return chain + queue
    if goal.objective != "throughput":
        return chain
    # step period times the requests in flight: the slowest of the stages, the hops and the whole cycle [time]
    period = model.lp.add_variable("period", 0)
    weight = model.problem.requests_in_flight * model.unit
    model.lp += period >= chain
    for g, group in enumerate(model.groups):
        _bound_stage_times(model, g, model.problem.devices[group.first].decode, period, weight)
    for p in range(model.problem.num_layers + 1):
        # At most one hop happens at a position, so their sum is the one that does.
        model.lp += period >= weight * pulp.lpSum(_hop_times(model, costs, p))
    model.lp += period >= weight * pulp.lpSum(_back_times(model, costs))
    return period


def _hop_times(model: LayersModel, costs: ChainCosts, p: int) -> list[Expression]:
    groups = model.groups
    return [(between(costs.hop, groups[a], groups[b]) or 0) * hop for (q, a, b), hop in model.hops.items() if p == q]


def _back_times(model: LayersModel, costs: ChainCosts) -> list[Expression]:
    groups = model.groups
    alone = [(costs.back[g.first][g.first] or 0) * s for g, s in zip(groups, model.single, strict=True)]
    pairs = [(between(costs.back, groups[a], groups[b]) or 0) * c for (a, b), c in model.returns.items()]
    return alone + pairs


def _chain_time(model: LayersModel, costs: ChainCosts) -> Expression:
    terms: list[Expression] = []
    for g, group in enumerate(model.groups):
        units = costs.units[group.first]
        terms += [ticks * held for ticks, held in zip(units.layers, model.hold[g], strict=True)]
        terms += [units.embedding * model.start[g], units.head * model.end[g]]
    groups = model.groups
    terms += [(between(costs.hop, groups[a], groups[b]) or 0) * hop for (_, a, b), hop in model.hops.items()]
    return model.unit * pulp.lpSum(terms + _back_times(model, costs))


def _bound_stage_times(model: LayersModel, g: int, times: UnitTicks, limit: Any, weight: float) -> None:
    """limit >= weight * times of every stage on g."""
    layers = [weight * ticks for ticks in times.layers]
    embedding, head = weight * times.embedding, weight * times.head
    if model.groups[g].size == 1:
        held = pulp.lpSum(cost * held for cost, held in zip(layers, model.hold[g], strict=True))
        model.lp += limit >= held + embedding * model.start[g] + head * model.end[g]
        return
    model.lp += limit >= embedding * model.start[g]
    model.lp += limit >= head * model.end[g]
    model.lp += limit >= (embedding + head + sum(layers)) * model.single[g]
    _accumulate(model, g, limit, "time", layers=layers, fresh=0.0, embedding=embedding, head=head)


def _bound_share(model: LayersModel, g: int, share: Any) -> None:
    """share >= used / budget for every stage; the workspace is the largest over the kinds of unit it holds."""
    problem, units, group = model.problem, model.problem.units, model.groups[g]
    device = problem.devices[group.first]
    budget = device.budget_bytes
    start, end, hold = model.start[g], model.end[g], model.hold[g]
    whole = problem.stage_bytes(group.first, 0, problem.num_layers, embedding=True, head=True)
    model.lp += share >= whole / budget * model.single[g]
    model.lp += share >= (device.overhead_bytes + units.embedding + units.embedding_activation) / budget * start
    model.lp += share >= (device.overhead_bytes + units.head + units.head_activation) / budget * end
    layers = [size / budget for size in units.layers]
    if group.size > 1:
        _accumulate(
            model, g, share, "share",
            layers=layers,
            fresh=(device.overhead_bytes + units.layer_activation) / budget,
            embedding=(units.embedding + max(0, units.embedding_activation - units.layer_activation)) / budget,
            head=(units.head + max(0, units.head_activation - units.layer_activation)) / budget,
        )  # fmt: skip
        return
    # 1 if the stage on g holds layers; only the first and the last stage may hold none
    has_layers = model.lp.add_variable(f"has_layers_{g}", 0, 1)
    model.lp += has_layers >= hold[0]
    model.lp += has_layers >= hold[-1]
    model.lp += has_layers >= model.stages_on(g) - start - end
    ends = (units.embedding * start + units.head * end) / budget - units.shared / budget * model.single[g]
    held = pulp.lpSum(size * x for size, x in zip(layers, hold, strict=True)) + ends
    held += device.overhead_bytes / budget * model.stages_on(g)
    model.lp += share >= held + units.layer_activation / budget * has_layers
    model.lp += share >= held + units.embedding_activation / budget * start
    model.lp += share >= held + units.head_activation / budget * end


def _accumulate(
    model: LayersModel,
    g: int,
    limit: Any,
    name: str,
    *,
    layers: list[float],
    fresh: float,
    embedding: float,
    head: float,
) -> None:
    """Where several devices share the node g, follow what the current stage has gathered, layer by layer."""
    hold, lp = model.hold[g], model.lp
    largest = fresh + sum(layers) + embedding + head
    # what the stage at work on g has gathered once layer l is done [same as limit]
    gathered = [model.lp.add_variable(f"{name}_gathered_{g}_{x}", 0) for x in range(len(layers))]
    for x, weight in enumerate(layers):
        lp += gathered[x] >= (fresh + weight) * hold[x]
        lp += limit >= gathered[x]
        if x:
            is_other = 2 - hold[x] - hold[x - 1] + pulp.lpSum(model.switches(g, x, x))
            lp += gathered[x] >= gathered[x - 1] + weight - 2 * largest * is_other
    # A device that holds everything has a bound of its own: two ends on one device are not just added up.
    begins = 2 - hold[0] - model.start[g] + model.single[g] + pulp.lpSum(model.switches(g, 0, 0))
    lp += gathered[0] >= fresh + layers[0] + embedding - 2 * largest * begins
    ends = 2 - hold[-1] - model.end[g] + model.single[g] + pulp.lpSum(model.switches(g, len(layers), len(layers)))
    lp += limit >= gathered[-1] + head - 2 * largest * ends
