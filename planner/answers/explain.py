"""Why there is no plan: which device is short, by how many bytes, and the smallest single changes that would do.

Every number here was found by asking again whether a plan exists, with just that one thing changed.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

from planner.answers.advice import advice_for
from planner.answers.case import Case, Shortage, all_connected, least_shortage
from planner.problem.problem import Assignment, Problem, StageChoice
from planner.problem.uniform import uniform_counts
from plans.errors import InfeasibleError
from plans.reading.sizes import format_bytes


def explain_infeasible(case: Case) -> InfeasibleError:
    """Return the error that says what is short and what would help."""
    shortage = least_shortage(case)
    advice = list(advice_for(case, shortage))
    hint = f"any one of these would do: {'; '.join(advice)}" if advice else "no single change was found that would do"
    return InfeasibleError(_what(case, shortage), where=case.profile.model.name, hint=hint)


def _what(case: Case, shortage: Shortage | None) -> str:
    problem = case.problem
    if not any(device.limit_bytes > 0 and not device.rule.is_banned for device in problem.devices):
        return "no device offers any memory"
    if case.strategy == "uniform" and problem.num_devices > problem.num_layers + 2 - (problem.num_layers > 1):
        return f"{problem.num_layers} layers cannot be spread evenly over {problem.num_devices} devices"
    chain = _fixed_chain(case)
    if chain is not None and (short := list(_short_stages(problem, chain))):
        return f"this cut does not fit: {', '.join(short)}"
    missing = _missing_link(problem)
    if missing is not None and case.fits(all_connected(problem)):
        return f"the devices have the memory, but no chain of links connects enough of them; there is no way {missing}"
    usable = [d.limit_bytes - d.overhead_bytes for d in problem.devices if not d.rule.is_banned]
    needed, offered = format_bytes(_least_bytes(problem)), format_bytes(sum(max(size, 0) for size in usable))
    total = f"weights and cache are {needed} in all, the devices offer {offered} beside their overhead"
    if shortage is None:
        return f"no plan exists under these demands; {total}"
    device = problem.devices[shortage.device]
    return (
        f"no plan fits: the smallest shortage is {shortage.num_bytes} bytes ({format_bytes(shortage.num_bytes)}) on "
        f"{device.name}, which offers {format_bytes(device.limit_bytes)}; {total}" + _unit_that_fits_nowhere(problem)
    )


def _fixed_chain(case: Case) -> Assignment | None:
    """The one chain there is to check: a complete cut given by hand, or the even split."""
    if case.given is not None or case.strategy != "uniform":
        return case.given
    ends = list(accumulate(uniform_counts(case.problem.num_layers, case.problem.num_devices)))
    return tuple(StageChoice(i, start, end) for i, (start, end) in enumerate(pairwise([0, *ends])))


def _short_stages(problem: Problem, chain: Assignment) -> Iterator[str]:
    last = len(chain) - 1
    for index, stage in enumerate(chain):
        device = problem.devices[stage.device]
        needed = problem.stage_bytes(stage.device, stage.start, stage.end, embedding=index == 0, head=index == last)
        missing = needed - device.limit_bytes
        if missing > 0:
            yield (
                f"{device.name} lacks {missing} bytes ({format_bytes(missing)}) for its {stage.end - stage.start} "
                f"layers and offers {format_bytes(device.limit_bytes)}"
            )


def _least_bytes(problem: Problem) -> int:
    """What the units need together, without any workspace or overhead."""
    units = problem.units
    return units.embedding + sum(units.layers) + units.head - units.shared


def _unit_that_fits_nowhere(problem: Problem) -> str:
    devices = [i for i, device in enumerate(problem.devices) if not device.rule.is_banned]
    room = max(problem.devices[i].limit_bytes - problem.devices[i].overhead_bytes for i in devices)
    sizes = {"the embedding": problem.units.embedding + problem.units.embedding_activation}
    sizes["the head"] = problem.units.head + problem.units.head_activation
    largest = max(problem.units.layers)
    sizes[f"layer {problem.units.layers.index(largest)}"] = largest + problem.units.layer_activation
    for name, size in sizes.items():
        if size > room:
            return f"; {name} alone needs {format_bytes(size)} and no device has more than {format_bytes(max(room, 0))}"
    return ""


def _missing_link(problem: Problem) -> str | None:
    for a, row in enumerate(problem.decode_hop):
        for b, hop in enumerate(row):
            if a != b and (hop is None or problem.return_hop[a][b] is None):
                return f"from {problem.devices[a].name} to {problem.devices[b].name}"
    return None
