"""Why there is no plan: which device is short, by how many bytes, and the smallest single changes that would do.

Every number here was found by asking again whether a plan exists, with just that one thing changed.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from planner.evaluate import violations
from planner.feasible import has_plan
from planner.problem import Assignment, Matrix, Problem, ProblemDevice, Rule, UnitTicks
from planner.problem_build import unit_bytes
from planner.uniform import nearest_split, uniform_problem
from plans.config import DTYPE_SIZES
from plans.errors import InfeasibleError
from plans.plan import Strategy
from plans.profile import DtypeName, ModelProfile
from plans.sizes import format_bytes
from plans.workload import Workload

_MOST_BYTES = 1 << 60
_SECONDS = 5.0
"""Looking for advice stops after this; what was found until then is given."""


@dataclass(frozen=True)
class Case:
    """A problem that has no plan, and what it was built from."""

    problem: Problem
    profile: ModelProfile
    workload: Workload
    strategy: Strategy
    given: Assignment | None = None
    deadline: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    def fits(self, problem: Problem) -> bool:
        """Return whether a changed problem is known to have a plan by this strategy."""
        if self.given is not None:
            return not violations(problem, self.given)
        changed = uniform_problem(problem) if self.strategy == "uniform" else problem
        return has_plan(changed) is True

    def fits_workload(self, **changes: object) -> bool:
        """Return whether another workload has a plan on the same devices."""
        workload = self.workload.model_copy(update=changes)
        return self.fits(replace(self.problem, units=unit_bytes(self.profile, workload)))

    @property
    def is_over(self) -> bool:
        """Whether the time for advice is up."""
        return time.monotonic() > self.deadline


def explain_infeasible(case: Case) -> InfeasibleError:
    """Return the error that says what is short and what would help."""
    shortage = _least_shortage(case)
    advice = list(_advice(case, shortage))
    hint = f"any one of these would do: {'; '.join(advice)}" if advice else "no single change was found that would do"
    return InfeasibleError(_what(case, shortage), where=case.profile.model.name, hint=hint)


@dataclass(frozen=True, slots=True)
class Shortage:
    """The device that needs the fewest bytes more, alone, for a plan to exist."""

    device: int
    num_bytes: int


def _least_shortage(case: Case) -> Shortage | None:
    best: Shortage | None = None
    tried: list[ProblemDevice] = []
    for index, device in enumerate(case.problem.devices):
        # Interchangeable devices are short by the same amount, except where their place in the order matters.
        is_known = not case.problem.keep_order and replace(device, name="") in tried
        if is_known or device.rule.is_banned or case.is_over:
            continue
        tried.append(replace(device, name=""))
        most = _MOST_BYTES if best is None else best.num_bytes - 1
        extra = _smallest(partial(_fits_with_more, case, index), most=most)
        best = Shortage(index, extra) if extra is not None else best
    return best


def _fits_with_more(case: Case, index: int, num_bytes: int) -> bool:
    return case.fits(_with_more(case.problem, index, num_bytes))


def _with_more(problem: Problem, index: int, num_bytes: int) -> Problem:
    device = problem.devices[index]
    more = replace(device, limit_bytes=device.limit_bytes + num_bytes, budget_bytes=device.budget_bytes + num_bytes)
    return replace(problem, devices=(*problem.devices[:index], more, *problem.devices[index + 1 :]))


def _smallest(is_enough: Callable[[int], bool], *, most: int) -> int | None:
    """Return the smallest n from 1 to `most` that is enough, None if not even `most` is; more is never worse."""
    if most < 1 or not is_enough(most):
        return None
    low, high = 0, 1
    while high < most and not is_enough(high):
        low, high = high, min(high * 2, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _largest(is_allowed: Callable[[int], bool], *, least: int, most: int) -> int | None:
    """Return the largest n from `least` to `most` that is allowed; more is never better."""
    if most < least or not is_allowed(least):
        return None
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    return low


def _what(case: Case, shortage: Shortage | None) -> str:
    problem = case.problem
    if not any(device.limit_bytes > 0 and not device.rule.is_banned for device in problem.devices):
        return "no device offers any memory"
    if case.strategy == "uniform" and problem.num_devices > problem.num_layers + 2 - (problem.num_layers > 1):
        return f"{problem.num_layers} layers cannot be spread evenly over {problem.num_devices} devices"
    missing = _missing_link(problem)
    if missing is not None and case.fits(_all_connected(problem)):
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


def _all_connected(problem: Problem) -> Problem:
    def connect(matrix: Matrix) -> Matrix:
        return tuple(tuple(cell or 0 if a != b else cell for b, cell in enumerate(r)) for a, r in enumerate(matrix))

    prefill = tuple(connect(matrix) for matrix in problem.prefill_hop)
    return replace(
        problem, decode_hop=connect(problem.decode_hop), return_hop=connect(problem.return_hop), prefill_hop=prefill
    )


def _advice(case: Case, shortage: Shortage | None) -> Iterator[str]:
    if case.strategy == "uniform":
        yield from _nearest_split(case)
    for find in (_smaller_workload, _other_dtypes, lambda c: _more_memory(c, shortage), _one_more_device):
        if not case.is_over:
            yield from find(case)


def _nearest_split(case: Case) -> Iterator[str]:
    split = nearest_split(case.problem)
    if split is not None:
        yield f"the nearest split that fits, --strategy custom --layers {','.join(map(str, split))}"


def _smaller_workload(case: Case) -> Iterator[str]:
    work = case.workload
    asked = work.prompt_tokens + work.new_tokens
    for option, key, least in (
        ("--ctx-size", "context_tokens", asked),
        ("--batch-size", "batch_size", 1),
        ("--requests-in-flight", "requests_in_flight", 1),
        ("--prefill-chunk", "prefill_chunk_tokens", 1),
    ):
        now = getattr(work, key)
        best = _largest(partial(_fits_workload, case, key), least=least, most=now - 1)
        if best is not None:
            yield f"{option} {best} (now {now})"


def _fits_workload(case: Case, key: str, value: int) -> bool:
    return case.fits_workload(**{key: value})


def _other_dtypes(case: Case) -> Iterator[str]:
    """Dtypes the runtime computes in; its KV cache has the dtype of the weights."""
    work, profile = case.workload, case.profile
    if DTYPE_SIZES[work.kv_cache_dtype] > DTYPE_SIZES[work.dtype]:
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
    return all(unit.weight_bytes == unit.parameters * DTYPE_SIZES[profile.dtype] for unit in profile.units)


def _halved(profile: ModelProfile) -> ModelProfile:
    units = tuple(unit.model_copy(update={"weight_bytes": unit.parameters * 2}) for unit in profile.units)
    return profile.model_copy(update={"units": units, "dtype": "bf16"})


def _with_kv_dtype(profile: ModelProfile, dtype: DtypeName) -> ModelProfile:
    old, new = DTYPE_SIZES[profile.kv_cache_dtype], DTYPE_SIZES[dtype]
    units = tuple(
        unit.model_copy(update={"kv_bytes_per_token": unit.kv_bytes_per_token * new // old}) for unit in profile.units
    )
    return profile.model_copy(update={"units": units, "kv_cache_dtype": dtype})


def _more_memory(case: Case, shortage: Shortage | None) -> Iterator[str]:
    if shortage is None:
        return
    device = case.problem.devices[shortage.device]
    wanted = device.limit_bytes + shortage.num_bytes
    yield f"a budget of {wanted} bytes ({format_bytes(wanted)}) on {device.name}, by a smaller --margin or more memory"


def _one_more_device(case: Case) -> Iterator[str]:
    if case.given is not None or case.strategy == "uniform":
        return
    needed = _smallest(lambda n: case.fits(with_new_device(case.problem, n)), most=_MOST_BYTES)
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
