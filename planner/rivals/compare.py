"""All strategies and all other engines' rules side by side, each scored by the same simulator.

`planner.simulate.one_plan` shares no code with the integer program, and scores a chain of ours as it would score the
same chain from anybody else. Memory is counted by `plans.memory`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner.answers.solve import solve
from planner.problem.question import Question
from planner.problem.uniform import uniform_counts
from planner.program.effort import USUAL, Effort
from planner.rivals.rules import Split, all_splits, chain_of, llama_cpp
from planner.simulate.one_plan import Simulation, simulate
from planner.timing.costs import CostModel
from plans.errors import InfeasibleError
from plans.memory import device_overhead_bytes, stage_memory, tied_table_bytes
from plans.plan import Objective, SolveStatus, Strategy
from plans.stages import StageRange
from plans.workload import Workload

Kind = Literal["strategy", "rule", "partition"]
STRATEGIES: tuple[Strategy, ...] = ("compute", "memory", "mixed", "uniform")


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a chain needs on one device, and what the device offers."""

    device: str
    used_bytes: int
    budget_bytes: int

    @property
    def share(self) -> float:
        """Used / budget."""
        return self.used_bytes / self.budget_bytes if self.budget_bytes else float("inf")

    @property
    def missing_bytes(self) -> int:
        """Bytes that do not fit; 0 if all do."""
        return max(0, self.used_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Row:
    """One proposal and its score."""

    name: str
    kind: Kind
    stages: tuple[StageRange, ...] = ()
    """Empty where there is no chain; `reason` then says why."""
    use: tuple[DeviceUse, ...] = ()
    score: Simulation | None = None
    """None without a chain, or where two of its devices are not connected."""
    reason: str = ""
    note: str = ""
    status: SolveStatus | None = None
    """For strategies: whether the plan is proved."""

    @property
    def fits(self) -> bool:
        """Whether the chain can run: it exists, is connected, and every device has room for its part."""
        return self.score is not None and not any(use.missing_bytes for use in self.use)

    @property
    def max_share(self) -> float | None:
        """The largest used/budget over the devices."""
        return max((use.share for use in self.use), default=None)

    @property
    def has_repeats(self) -> bool:
        """Whether a device holds several stages, which no plan of ours does."""
        return len({stage.device for stage in self.stages}) < len(self.stages)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows for one model, cluster and workload, and by which time they are ranked."""

    rows: tuple[Row, ...]
    objective: Objective
    workload: Workload

    def seconds(self, row: Row) -> float | None:
        """Return a row's time by the objective: per token, per request or per pipeline step."""
        return None if row.score is None else objective_seconds(row.score, self.objective, self.workload)

    @property
    def best(self) -> Row | None:
        """The fastest row that fits; of equally fast ones the first."""
        fitting = [row for row in self.rows if row.fits]
        return min(fitting, key=lambda row: self.seconds(row) or 0.0, default=None)


def objective_seconds(score: Simulation, objective: Objective, workload: Workload) -> float:
    """Return the simulated time an objective stands for."""
    if objective == "throughput":
        return score.step_period_seconds
    if objective == "request":
        steps = max(workload.new_tokens - 1, 0)
        return score.time_to_first_token_seconds + steps * score.seconds_per_token
    return score.seconds_per_token


def compare(question: Question, effort: Effort = USUAL, *, partitions: Iterable[tuple[str, Split]] = ()) -> Comparison:
    """Score every strategy, every rule, and the partitions given.

    Args:
        question: answered by every strategy. A cut that it demands belongs to `custom` alone and is left out; its other
            demands hold for all strategies, and for no rule of another engine.
        effort: for each strategy.
        partitions: (name, chain) of partitions a user already has.

    Raises:
        MachineError: no solver works here.
    """
    profile, cluster, workload = question.profile, question.cluster, question.workload
    referee = CostModel(profile, workload=workload, cluster=cluster, execution=question.execution)

    def own(strategy: Strategy) -> Row:
        try:
            plan = solve(question.by(strategy), effort)
        except InfeasibleError as error:
            return _without_plan(referee, strategy, error)
        return _scored(referee, strategy, "strategy", plan.ranges, status=plan.proof.status)

    rows = [own(strategy) for strategy in STRATEGIES]
    rows += [_score_split(referee, _fitting(referee, split), "rule") for split in all_splits(profile, cluster=cluster)]
    rows += [replace(_score_split(referee, split, "partition"), name=name) for name, split in partitions]
    return Comparison(tuple(rows), question.objective, workload)


def _without_plan(referee: CostModel, strategy: Strategy, error: InfeasibleError) -> Row:
    """A strategy that found nothing; of the even split it can still be said what is short where."""
    names = [device.name for device in referee.cluster.devices]
    counts = uniform_counts(referee.profile.model.num_hidden_layers, len(names))
    if strategy != "uniform" or not all(counts[1:-1]):
        return Row(strategy, "strategy", reason=error.what, status="infeasible")
    owners = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    row = _scored(referee, strategy, "strategy", chain_of([names[0], *owners, names[-1]]), status="infeasible")
    return row if row.reason or not row.fits else replace(row, reason=error.what, score=None)


def _fitting(referee: CostModel, split: Split) -> Split:
    """llama.cpp offloads as many layers as fit (its --fit): the largest -ngl that does, or all where none does."""
    if split.engine != "llama.cpp" or split.reason:
        return split
    num_layers = referee.profile.model.num_hidden_layers
    for num_gpu_layers in range(num_layers + 1, -1, -1):
        other = llama_cpp(referee.profile, referee.cluster, num_gpu_layers=num_gpu_layers)
        if other.stages and not any(use.missing_bytes for use in memory_use(referee, other.stages)):
            return replace(other, note="" if num_gpu_layers > num_layers else f"with -ngl {num_gpu_layers}")
    return split


def _score_split(referee: CostModel, split: Split, kind: Kind) -> Row:
    if split.reason:
        return Row(split.engine, kind, reason=split.reason)
    return _scored(referee, split.engine, kind, split.stages, note=split.note)


def _scored(
    referee: CostModel,
    name: str,
    kind: Kind,
    stages: tuple[StageRange, ...],
    *,
    note: str = "",
    status: SolveStatus | None = None,
) -> Row:
    row = Row(name, kind, stages, memory_use(referee, stages), note=note, status=status)
    try:
        return replace(row, score=simulate(referee, stages=stages))
    except InfeasibleError as error:
        return replace(row, reason=error.what)


def memory_use(referee: CostModel, stages: Sequence[StageRange]) -> tuple[DeviceUse, ...]:
    """Return what a chain needs on each of its devices, also where a device holds several stages."""
    names = dict.fromkeys(stage.device for stage in stages)
    return tuple(_device_use(referee, name, [stage for stage in stages if stage.device == name]) for name in names)


def _device_use(referee: CostModel, name: str, stages: Sequence[StageRange]) -> DeviceUse:
    device = referee.cluster.device(name)
    parts = [stage_memory(referee.profile, workload=referee.workload, stage=stage) for stage in stages]
    has_both_ends = len(stages) > 1 and stages[0].has_embedding and stages[-1].has_head
    used = sum(part.weight_bytes + part.kv_cache_bytes for part in parts) + max(part.activation_bytes for part in parts)
    used -= tied_table_bytes(referee.profile) if has_both_ends else 0
    is_process_per_stage = referee.execution == "process_per_stage"
    used += device_overhead_bytes(device, referee.cluster, is_process_per_stage=is_process_per_stage)
    return DeviceUse(name, used, device.budget_bytes or 0)
