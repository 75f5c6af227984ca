"""What the program for differing layers minimises: times and memory shares over the segments of `ilp_layers`."""

from collections.abc import Callable
from typing import Any

import pulp

from planner.problem.goal import Goal
from planner.problem.groups import between
from planner.problem.problem import ChainCosts, UnitTicks, chain_costs, is_pipelined, queue_costs
from planner.program.layers import Expression, LayersModel, Segment


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
    _bound_stages(model, share, lambda s: _share_of(model, s))
    if goal.kind == "share":
        model.lp.setObjective(100 * share)
        return
    weight = float(goal.weight)
    time_scale = 100 * weight / (goal.best_time * model.unit) if goal.best_time else 0.0
    share_scale = 100 * (1 - weight) / float(goal.best_share) if goal.best_share else 0.0
    model.lp.setObjective(time_scale * time + share_scale * share)


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
