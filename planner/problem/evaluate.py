"""The exact value of one assignment: its time in ticks, its memory share as a fraction, and whether it is allowed.

Written against the definitions and `plans.stages` alone, so that it can judge the solver and the certificate alike.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from planner.problem.problem import Assignment, Matrix, Problem, Ticks, UnitTicks, chain_costs
from plans.plan import Objective
from plans.stages import chain_fault


@dataclass(frozen=True, slots=True)
class Value:
    """What an assignment is worth."""

    time: Ticks
    """Ticks; for `throughput` the step period times the requests in flight, which keeps it whole."""
    share: Fraction
    """The largest used/budget over the stages."""


def evaluate(problem: Problem, assignment: Assignment, *, objective: Objective) -> Value:
    """Return the exact value of an assignment that `violations` finds nothing wrong with."""
    return Value(time_of(problem, assignment, objective=objective), share_of(problem, assignment))


def share_of(problem: Problem, assignment: Assignment) -> Fraction:
    """Return the largest used/budget over the stages."""
    last = len(assignment) - 1
    return max(
        Fraction(
            problem.stage_bytes(s.device, s.start, s.end, embedding=i == 0, head=i == last),
            problem.devices[s.device].budget_bytes,
        )
        for i, s in enumerate(assignment)
    )


def time_of(problem: Problem, assignment: Assignment, *, objective: Objective) -> Ticks:
    """Return the time objective in ticks (see `Value.time`)."""
    if objective == "throughput":
        return _scaled_period(problem, assignment)
    if objective == "request" and problem.execution == "process_per_stage":
        steps = max(problem.new_tokens - 1, 0)
        return pipelined_prefill(problem, assignment) + steps * time_of(problem, assignment, objective="latency")
    costs = chain_costs(problem, objective)
    stages = sum(_stage_ticks(costs.units[s.device], assignment, i) for i, s in enumerate(assignment))
    hops = sum(_hop(costs.hop, a.device, b.device) for a, b in pairwise(assignment))
    return stages + hops + _hop(costs.back, assignment[-1].device, assignment[0].device)


def _scaled_period(problem: Problem, assignment: Assignment) -> Ticks:
    slowest = max(_stage_ticks(problem.devices[s.device].decode, assignment, i) for i, s in enumerate(assignment))
    hops = [_hop(problem.decode_hop, a.device, b.device) for a, b in pairwise(assignment)]
    hops.append(_hop(problem.return_hop, assignment[-1].device, assignment[0].device))
    cycle = time_of(problem, assignment, objective="latency")
    return max(problem.requests_in_flight * max(slowest, *hops, *_bus_ticks(problem, assignment)), cycle)


def _bus_ticks(problem: Problem, assignment: Assignment) -> list[Ticks]:
    """How long every bus is busy in one decode step: all that its stages read goes through it."""
    return [
        sum(_stage_ticks(bus.units, assignment, i) for i, stage in enumerate(assignment) if stage.device in bus.devices)
        for bus in problem.buses
    ]


def pipelined_prefill(problem: Problem, assignment: Assignment) -> Ticks:
    """Return the time to the first token when every stage is a process.

    arrive[s, c] = max(finish[s-1, c], arrive[s, c-1]) + hop[s-1, c]   a link carries one chunk at a time
    finish[s, c] = max(arrive[s, c], finish[s, c-1]) + t[s, c]
    """
    num_chunks = len(problem.devices[0].prefill)
    arrival = [0] * num_chunks
    for index, stage in enumerate(assignment):
        finish: list[Ticks] = []
        for chunk in range(num_chunks):
            free = finish[-1] if finish else 0
            busy = _stage_ticks(problem.devices[stage.device].prefill[chunk], assignment, index)
            finish.append(max(arrival[chunk], free) + busy)
        if index + 1 < len(assignment):
            following = assignment[index + 1].device
            free = 0
            for chunk, done in enumerate(finish):
                arrival[chunk] = free = max(done, free) + _hop(problem.prefill_hop[chunk], stage.device, following)
    return finish[-1] if num_chunks else 0


def _stage_ticks(times: UnitTicks, assignment: Assignment, index: int) -> Ticks:
    stage = assignment[index]
    is_first, is_last = index == 0, index == len(assignment) - 1
    return sum(times.layers[stage.start : stage.end]) + times.embedding * is_first + times.head * is_last


def _hop(matrix: Matrix, start: int, end: int) -> Ticks:
    ticks = matrix[start][end]
    assert ticks is not None, "a chain uses a hop that does not exist"
    return ticks


def violations(problem: Problem, assignment: Assignment) -> list[str]:
    """Return what is wrong with an assignment, in plain words; empty when it is a valid plan."""
    found = _chain_violations(problem, assignment)
    if found:
        return found
    for s, units in zip(assignment, problem.ranges(assignment), strict=True):
        if not problem.allows(s.device, s.start, s.end, embedding=units.has_embedding, head=units.has_head):
            found.append(f"{units.words} do not fit {units.device} or break its rule")
    used = {stage.device for stage in assignment}
    for index, device in enumerate(problem.devices):
        if index not in used and (problem.use_all or device.rule.is_required):
            found.append(f"{device.name} is not used")
    return found


def _chain_violations(problem: Problem, assignment: Assignment) -> list[str]:
    found: list[str] = []
    devices = [stage.device for stage in assignment]
    if not assignment:
        return ["there is no stage"]
    if len(set(devices)) != len(devices):
        found.append("a device holds two stages")
    if problem.keep_order and devices != sorted(devices):
        found.append("the devices are out of order")
    if problem.max_stages is not None and len(assignment) > problem.max_stages:
        found.append(f"{len(assignment)} stages, at most {problem.max_stages} are allowed")
    fault = chain_fault(problem.ranges(assignment), num_layers=problem.num_layers)
    found += [str(fault)] if fault is not None else []
    ways = [(problem.decode_hop, a.device, b.device) for a, b in pairwise(assignment)]
    ways.append((problem.return_hop, assignment[-1].device, assignment[0].device))
    found += [f"no way from device {a} to device {b}" for matrix, a, b in ways if matrix[a][b] is None]
    return found
