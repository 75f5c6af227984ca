"""What a chain is worth and whether it is allowed, by the definitions of `docs/planning.md` alone.

Tests judge the planner by this: nothing here is taken from `planner.problem.evaluate`, nor from the methods of a
problem. It is slow and literal: every unit of a stage is named, every token and every chunk is counted by itself.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from planner.problem.problem import Assignment, Bus, Problem, StageChoice, UnitTicks
from plans.plan import Objective


@dataclass(frozen=True, slots=True)
class Worth:
    """Ticks (for `throughput` the step period times the requests in flight), and the largest used/budget."""

    time: int
    share: Fraction


def worth_of(problem: Problem, chain: Assignment, *, objective: Objective) -> Worth:
    """Return what an allowed chain is worth."""
    return Worth(_time(problem, chain, objective), max(_shares(problem, chain)))


def is_allowed(problem: Problem, chain: Assignment) -> bool:
    """Return whether the stages go from the first layer to the last, fit, reach each other and obey every rule."""
    used = [stage.device for stage in chain]
    held = [layer for stage in chain for layer in range(stage.start, stage.end)]
    demanded = {n for n, device in enumerate(problem.devices) if problem.use_all or device.rule.is_required}
    return (
        held == list(range(len(problem.units.layers)))
        and len(used) == len(set(used))
        and (used == sorted(used) or not problem.keep_order)
        and (problem.max_stages is None or len(chain) <= problem.max_stages)
        and demanded <= set(used)
        and all(stage.start < stage.end for stage in chain[1:-1])
        and None not in _hops(problem, chain)
        and all(_fits(problem, chain, stage) and _obeys(problem, chain, stage) for stage in chain)
    )


def _units(problem: Problem, chain: Assignment, stage: StageChoice) -> list[str | int]:
    """The units of a stage: `embedding`, numbers of layers, `head`."""
    first: list[str | int] = ["embedding"] if stage is chain[0] else []
    last: list[str | int] = ["head"] if stage is chain[-1] else []
    return [*first, *range(stage.start, stage.end), *last]


def _bytes(problem: Problem, chain: Assignment, stage: StageChoice) -> int:
    sizes, units = problem.units, _units(problem, chain, stage)
    weights = {"embedding": sizes.embedding, "head": sizes.head} | dict(enumerate(sizes.layers))
    rooms = {"embedding": sizes.embedding_activation, "head": sizes.head_activation}
    tied = sizes.shared if {"embedding", "head"} <= set(units) else 0
    workspace = max((rooms.get(str(unit), sizes.layer_activation) for unit in units), default=0)
    return problem.devices[stage.device].overhead_bytes + sum(weights[unit] for unit in units) - tied + workspace


def _shares(problem: Problem, chain: Assignment) -> list[Fraction]:
    return [Fraction(_bytes(problem, chain, s), problem.devices[s.device].budget_bytes) for s in chain]


def _fits(problem: Problem, chain: Assignment, stage: StageChoice) -> bool:
    return _bytes(problem, chain, stage) <= problem.devices[stage.device].limit_bytes


def _obeys(problem: Problem, chain: Assignment, stage: StageChoice) -> bool:
    rule, units = problem.devices[stage.device].rule, _units(problem, chain, stage)
    layers = [unit for unit in units if isinstance(unit, int)]
    return (
        not rule.is_banned
        and rule.embedding in (None, "embedding" in units)
        and rule.head in (None, "head" in units)
        and len(layers) >= rule.min_layers
        and (rule.max_layers is None or len(layers) <= rule.max_layers)
        and (rule.max_start is None or stage.start <= rule.max_start)
        and (rule.min_end is None or stage.end >= rule.min_end)
        and not rule.banned & set(layers)
    )


def _hops(problem: Problem, chain: Assignment) -> list[int | None]:
    """A token's ways from stage to stage, and its id's way back."""
    forth = [problem.decode_hop[a.device][b.device] for a, b in pairwise(chain)]
    return [*forth, problem.return_hop[chain[-1].device][chain[0].device]]


def _busy(problem: Problem, chain: Assignment, stage: StageChoice, times: UnitTicks) -> int:
    of_unit = {"embedding": times.embedding, "head": times.head} | dict(enumerate(times.layers))
    return sum(of_unit[unit] for unit in _units(problem, chain, stage))


def _busy_bus(problem: Problem, chain: Assignment, bus: Bus) -> int:
    """All that the stages on a memory bus read in a step, one after the other."""
    return sum(_busy(problem, chain, stage, bus.units) for stage in chain if stage.device in bus.devices)


def _time(problem: Problem, chain: Assignment, objective: Objective) -> int:
    stages = [_busy(problem, chain, stage, problem.devices[stage.device].decode) for stage in chain]
    hops = [hop or 0 for hop in _hops(problem, chain)]
    token = sum(stages) + sum(hops)
    if objective == "latency":
        return token
    if objective == "throughput":
        buses = [_busy_bus(problem, chain, bus) for bus in problem.buses]
        return max(token, *(problem.requests_in_flight * part for part in (*stages, *hops, *buses)))
    return _prompt(problem, chain) + sum(token for _ in range(1, problem.new_tokens))


def _prompt(problem: Problem, chain: Assignment) -> int:
    """When the last chunk leaves the last stage.

    Stages and links take a chunk each, in turn; in one process a chunk goes through all before the next one starts.
    """
    is_overlapped = problem.execution == "process_per_stage"
    free = [0] * (2 * len(chain) - 1)
    now = 0
    for chunk, hop in enumerate(problem.prefill_hop):
        now = 0 if is_overlapped else now
        for index, stage in enumerate(chain):
            if index:
                way = hop[chain[index - 1].device][stage.device]
                now = free[2 * index - 1] = max(now, free[2 * index - 1]) + (way or 0)
            busy = _busy(problem, chain, stage, problem.devices[stage.device].prefill[chunk])
            now = free[2 * index] = max(now, free[2 * index]) + busy
    return now
