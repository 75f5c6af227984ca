"""Why there is no plan: which device is short, by how many bytes, and the smallest single changes that would do.

Every number here was found by asking again whether a plan exists, with just that one thing changed.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations

from planner.answers.case import MOST_BYTES, Case, Shortage, all_connected, largest, least_shortage, smallest
from planner.answers.strategies import run_strategy
from planner.problem.build import unit_bytes
from planner.problem.evaluate import evaluate
from planner.problem.problem import Assignment, Matrix, Problem, ProblemDevice, Rule, StageChoice, UnitTicks
from planner.problem.question import Question
from planner.problem.uniform import nearest_split, uniform_counts
from planner.program.effort import Effort
from plans.cuts import layer_ranges
from plans.dtypes import DTYPES, DtypeName
from plans.errors import InfeasibleError
from plans.profile import ModelProfile
from plans.reading.sizes import format_bytes

WIDTH_SECONDS = 5.0
"""Looking for the best plan in each width that would fit."""
MOST_MARGIN_PERCENT = 30
"""A budget that leaves more than this free was stated."""


def advice_for(case: Case, shortage: Shortage | None) -> Iterator[str]:
    """Yield the changes that would do, those that cost nothing first."""
    if case.question.strategy == "uniform":
        yield from _nearest_split(case)
    for find in (
        _one_more_link, _smaller_workload, _other_dtypes, _smaller_margin, lambda c: _more_memory(c, shortage),
        _one_more_device,
    ):  # fmt: skip
        if not case.is_over:
            yield from find(case)


def narrower_weights(question: Question) -> Iterator[str]:
    """Yield the widths in which the model would fit, each with what its best plan takes."""
    for found in question.narrower:
        asked = question.packed(found)
        case = Case(asked)
        if case.fits(case.problem):
            size = format_bytes(found.profile.total_weight_bytes)
            yield f"--weights {found.choice.kind} ({size} of weights{_best_time(case)})"


def _best_time(case: Case) -> str:
    asked, problem = case.question, case.problem
    with Effort(time_limit=WIDTH_SECONDS).session() as session:
        outcome = run_strategy(
            problem, strategy=asked.strategy, objective=asked.objective, session=session, weight=asked.weight,
            given=case.given,
        )  # fmt: skip
    if outcome.assignment is None:
        return ""
    seconds = problem.seconds(evaluate(problem, outcome.assignment, objective=asked.objective).time, asked.objective)
    return f"; its best plan takes {seconds * 1e3:.4g} ms per {_WHAT[asked.objective]}"


_WHAT = {"latency": "token", "request": "request", "throughput": "step"}


def _nearest_split(case: Case) -> Iterator[str]:
    split = nearest_split(case.problem)
    if split is not None:
        yield f"the nearest split that fits, --strategy custom --layers {','.join(map(str, split))}"


def _smaller_workload(case: Case) -> Iterator[str]:
    work = case.question.workload
    asked = work.prompt_tokens + work.new_tokens
    for option, key, least in (
        ("--ctx-size", "context_tokens", asked),
        ("--batch-size", "batch_size", 1),
        ("--requests-in-flight", "requests_in_flight", 1),
        ("--prefill-chunk", "prefill_chunk_tokens", 1),
    ):
        now = getattr(work, key)
        best = largest(partial(_fits_workload, case, key), least=least, most=now - 1)
        if best is not None:
            yield f"{option} {best} (now {now})"


def _fits_workload(case: Case, key: str, value: int) -> bool:
    return case.fits_workload(**{key: value})


def _other_dtypes(case: Case) -> Iterator[str]:
    """Dtypes the runtime computes in; its KV cache has the dtype of the weights."""
    work, profile = case.question.workload, case.question.profile
    if DTYPES[work.kv_cache_dtype].size_bytes > DTYPES[work.dtype].size_bytes:
        smaller = _with_kv_dtype(profile, work.dtype)
        workload = work.model_copy(update={"kv_cache_dtype": work.dtype})
        if case.fits(replace(case.problem, units=unit_bytes(smaller, workload))):
            yield f"--kv-cache-dtype {work.dtype} (now {work.kv_cache_dtype})"
    if work.dtype == "fp32" and _is_plain(profile):
        smaller = _with_kv_dtype(_halved(profile), "bf16")
        workload = work.model_copy(update={"dtype": "bf16", "kv_cache_dtype": "bf16"})
        if case.fits(replace(case.problem, units=unit_bytes(smaller, workload))):
            yield "--dtype bf16 (now fp32)"


def _is_plain(profile: ModelProfile) -> bool:
    return all(unit.weight_bytes == unit.parameters * DTYPES[profile.dtype].size_bytes for unit in profile.units)


def _halved(profile: ModelProfile) -> ModelProfile:
    units = tuple(unit.model_copy(update={"weight_bytes": unit.parameters * 2}) for unit in profile.units)
    return profile.model_copy(update={"units": units, "dtype": "bf16"})


def _with_kv_dtype(profile: ModelProfile, dtype: DtypeName) -> ModelProfile:
    old, new = DTYPES[profile.kv_cache_dtype].size_bytes, DTYPES[dtype].size_bytes
    units = tuple(
        unit.model_copy(update={"kv_bytes_per_token": unit.kv_bytes_per_token * new // old}) for unit in profile.units
    )
    return profile.model_copy(update={"units": units, "kv_cache_dtype": dtype})


def _smaller_margin(case: Case) -> Iterator[str]:
    """The largest margin, in whole percent, that would do on all accelerators that have one."""
    now = max((_margin_percent(case, index) for index in range(case.problem.num_devices)), default=0)
    best = largest(lambda percent: case.fits(_with_margin(case, percent)), least=0, most=now - 1)
    if best is not None:
        yield f"--margin {best}% on the accelerators (now up to {now}%)"


def _with_margin(case: Case, percent: int) -> Problem:
    def grown(index: int) -> ProblemDevice:
        device, memory = case.problem.devices[index], case.question.cluster.devices[index].memory_bytes
        if _margin_percent(case, index) <= percent:
            return device
        budget = _less_margin(memory, percent)
        return replace(device, limit_bytes=budget, budget_bytes=budget)

    return replace(case.problem, devices=tuple(grown(index) for index in range(case.problem.num_devices)))


def _margin_percent(case: Case, index: int) -> int:
    """The margin that a device's budget was made with; 0 where the budget is stated or follows from what is free."""
    device, budget = case.question.cluster.devices[index], case.problem.devices[index].limit_bytes
    percent = 100 * (device.memory_bytes - budget) // device.memory_bytes
    is_made = percent <= MOST_MARGIN_PERCENT and budget == _less_margin(device.memory_bytes, percent)
    return percent if device.kind != "cpu" and is_made else 0


def _less_margin(memory: int, percent: int) -> int:
    return memory - -(-memory * percent // 100)


def _more_memory(case: Case, shortage: Shortage | None) -> Iterator[str]:
    if shortage is None:
        return
    cluster = case.question.cluster
    device = cluster.devices[shortage.device]
    wanted = case.problem.devices[shortage.device].limit_bytes + shortage.num_bytes
    host = cluster.host_of(device)
    others = [d for d in cluster.devices if d.kind == "cpu" and d.host == device.host and d.name != device.name]
    in_host = wanted + sum(other.budget_bytes or 0 for other in others)
    if device.kind == "cpu" and host.memory_bytes is not None and in_host > host.memory_bytes:
        more = f"{format_bytes(in_host)} of memory in host {host.name}, which has {format_bytes(host.memory_bytes)}"
        yield f"{more}, for a budget of {wanted} bytes ({format_bytes(wanted)}) on {device.name}"
        return
    has = f"which has {format_bytes(device.memory_bytes)}"
    size = f"{wanted} bytes ({format_bytes(wanted)})"
    if wanted > device.memory_bytes:
        yield f"a device with {size} free in place of {device.name}, {has}"
    else:
        yield f"a budget of {size} on {device.name}, {has}"


def _one_more_link(case: Case) -> Iterator[str]:
    """One pair of hosts to connect, if that is enough, or else all of them."""
    connected = all_connected(case.problem)
    if connected == case.problem or not case.fits(connected):
        return
    hosts = list(dict.fromkeys(device.host for device in case.question.cluster.devices))
    for a, b in combinations(hosts, 2):
        if case.is_over:
            return
        joined = _with_link(case, a, b)
        if joined != case.problem and case.fits(joined):
            yield f"a link between {a} and {b}"
            return
    yield "links between all hosts (class between_hosts)"


def _with_link(case: Case, a: str, b: str) -> Problem:
    """Let every device of one host reach every device of the other in no time."""
    owners = [device.host for device in case.question.cluster.devices]

    def join(matrix: Matrix) -> Matrix:
        return tuple(
            tuple(0 if cell is None and {owners[x], owners[y]} == {a, b} else cell for y, cell in enumerate(row))
            for x, row in enumerate(matrix)
        )

    return case.problem.with_hops(join)


def _one_more_device(case: Case) -> Iterator[str]:
    if case.given is not None or case.question.strategy == "uniform":
        return
    needed = smallest(lambda n: case.fits(with_new_device(case.problem, n)), most=MOST_BYTES)
    if needed is not None:
        yield f"one more device with {needed} bytes ({format_bytes(needed)}) free for the model"


def with_new_device(problem: Problem, num_bytes: int) -> Problem:
    """Return the problem with a device at the end that reaches, and is reached by, all others in no time."""
    nothing = UnitTicks(0, (0,) * problem.num_layers, 0)
    device = ProblemDevice(
        "new", max(num_bytes, 1), 0, num_bytes, nothing, (nothing,) * len(problem.prefill_hop), Rule()
    )

    def grow(matrix: Matrix, corner: int | None) -> Matrix:
        return (*((*row, 0) for row in matrix), (*((0,) * len(matrix)), corner))

    return replace(
        problem,
        devices=(*problem.devices, device),
        decode_hop=grow(problem.decode_hop, None),
        return_hop=grow(problem.return_hop, 0),
        prefill_hop=tuple(grow(matrix, None) for matrix in problem.prefill_hop),
    )


def explain_infeasible(question: Question) -> InfeasibleError:
    """Return the error that says what is short and what would help."""
    case = Case(question)
    shortage = least_shortage(case)
    advice = [*narrower_weights(question), *advice_for(case, shortage)]
    hint = f"any one of these would do: {'; '.join(advice)}" if advice else "no single change was found that would do"
    return InfeasibleError(_what(case, shortage), where=case.question.profile.model.name, hint=hint)


def _what(case: Case, shortage: Shortage | None) -> str:
    problem = case.problem
    if not any(device.limit_bytes > 0 and not device.rule.is_banned for device in problem.devices):
        return "no device offers any memory"
    if case.question.strategy == "uniform" and problem.num_devices > problem.num_layers + 2 - (problem.num_layers > 1):
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
    if case.given is not None or case.question.strategy != "uniform":
        return case.given
    ranges = layer_ranges(uniform_counts(case.problem.num_layers, case.problem.num_devices))
    return tuple(StageChoice(i, start, end) for i, (start, end) in enumerate(ranges))


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
