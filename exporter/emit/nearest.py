"""The nearest cut that an engine takes: which layers change their device, as few as possible, and every budget held."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plans.memory import device_overhead_bytes, stage_memory
from plans.plan import Plan
from plans.stages import StageRange


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device of the plan that may hold layers, and how many it was planned to hold."""

    device: str
    host: str
    num_layers: int


def nearest_cut(
    plan: Plan, candidates: Sequence[Candidate], *, per_host: int | None = None
) -> tuple[StageRange, ...] | None:
    """Return the cut over some of these devices, in their order, that moves the fewest layers; None if none fits.

    Every stage holds a layer at least. Devices may be left out; of equal cuts the one that keeps more is taken.

    Args:
        candidates: the devices in chain order, those of a host together.
        per_host: stages of every host that is used; None for any number.
    """
    num_layers = plan.profile.model.num_hidden_layers
    reach = _Reach(plan, num_layers)
    best: dict[tuple[int, int], _Path] = {(0, 0): _Path()}  # (layers placed, stages on this host) -> cheapest way
    for index, candidate in enumerate(candidates, start=1):
        is_last_of_host = index == len(candidates) or candidates[index].host != candidate.host
        found: dict[tuple[int, int], _Path] = {}
        for (placed, on_host), path in best.items():
            for step in _steps(path, candidate, placed, reach):
                used = on_host + (len(step.stages) > len(path.stages))
                if is_last_of_host and per_host is not None and used not in (0, per_host):
                    continue
                key = (step.placed, 0 if is_last_of_host else used)
                found[key] = min(found.get(key, step), step, key=_Path.rank)
        best = found
    end = best.get((num_layers, 0))
    return end.stages if end is not None else None


def nearest_even_cut(plan: Plan, candidates: Sequence[Candidate]) -> tuple[StageRange, ...] | None:
    """Return the nearest cut in which every host that is used holds as many stages as the others."""
    numbers = range(1, max(Counter(c.host for c in candidates).values(), default=0) + 1)
    cuts = [cut for number in numbers if (cut := nearest_cut(plan, candidates, per_host=number)) is not None]
    planned = {c.device: c.num_layers for c in candidates}
    return min(cuts, key=lambda cut: (_moved(cut, planned), -len(cut)), default=None)


def _moved(cut: Sequence[StageRange], planned: Mapping[str, int]) -> int:
    held = {stage.device: stage.num_layers for stage in cut}
    return sum(abs(held.get(device, 0) - count) for device, count in planned.items())


@dataclass(frozen=True, slots=True)
class _Path:
    """Stages so far, and the layers that other devices were planned to hold."""

    stages: tuple[StageRange, ...] = ()
    moved: int = 0
    placed: int = 0

    def rank(self) -> tuple[int, int]:
        """Order of preference: less first."""
        return self.moved, -len(self.stages)


def _steps(path: _Path, candidate: Candidate, placed: int, reach: "_Reach") -> Iterator[_Path]:
    """Yield the path with nothing on the candidate, and with every number of layers that fits there."""
    yield _Path(path.stages, path.moved + candidate.num_layers, placed)
    for end in range(placed + 1, reach.num_layers + 1):
        stage = reach.stage(candidate.device, placed, end)
        if not reach.fits(stage):
            return
        moved = path.moved + abs(end - placed - candidate.num_layers)
        yield _Path((*path.stages, stage), moved, end)


@dataclass(frozen=True, slots=True)
class _Reach:
    """What fits where; every question is answered once."""

    plan: Plan
    num_layers: int
    known: dict[StageRange, bool] = field(default_factory=dict)

    def stage(self, device: str, start: int, end: int) -> StageRange:
        return StageRange(device, start, end, has_embedding=start == 0, has_head=end == self.num_layers)

    def fits(self, stage: StageRange) -> bool:
        if stage not in self.known:
            self.known[stage] = needed_bytes(self.plan, stage) <= (
                self.plan.cluster.device(stage.device).budget_bytes or 0
            )
        return self.known[stage]


def needed_bytes(plan: Plan, stage: StageRange) -> int:
    """Return what a stage would need on its device."""
    device = plan.cluster.device(stage.device)
    overhead = device_overhead_bytes(device, plan.cluster, is_process_per_stage=plan.execution == "process_per_stage")
    memory = stage_memory(plan.profile, workload=plan.workload, stage=stage, overhead_bytes=overhead)
    return memory.total_bytes


def as_option(stages: Sequence[StageRange]) -> str:
    """Return a cut as `llamaplan solve --layers` takes it."""
    return ",".join(f"{stage.start_layer}-{stage.end_layer}@{stage.device}" for stage in stages)
