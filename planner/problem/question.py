"""The question that a plan answers: what is to be placed where, what is minimised, and what is demanded."""

from dataclasses import dataclass, replace
from typing import Self

from planner.model.widths import Packed
from planner.problem.build import build_problem
from planner.problem.demands import Terms, read_demands
from planner.problem.problem import Problem
from plans.cluster import Cluster
from plans.errors import UsageError
from plans.packed.choice import WeightChoice
from plans.plan import NO_DEMANDS, Demands, Execution, Objective, Plan, Strategy, choice_fault
from plans.profile import ModelProfile
from plans.workload import Workload


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that decides which plan is the best; `dataclasses.replace` asks a variant of it.

    Raises:
        UsageError: parts that contradict each other.
    """

    profile: ModelProfile
    """The model, from `planner.model.profile.build_profile`."""
    cluster: Cluster
    """Devices with budgets, from `planner.devices.clusters.load_cluster` or `planner.devices.budgets.with_budgets`."""
    workload: Workload
    """What is asked of the model; its dtypes must be the profile's."""
    strategy: Strategy = "compute"
    """What is minimised, see `planner.answers.strategies`."""
    objective: Objective = "latency"
    """Which time is meant: seconds per token, seconds of a whole request, or the step period."""
    weight: float = 0.5
    """Of time in `mixed`, from 0 to 1."""
    execution: Execution = "one_process"
    demands: Demands = NO_DEMANDS
    weights: WeightChoice | None = None
    """What the profile's weights are packed to; None where they stay as they are stored."""
    narrower: tuple[Packed, ...] = ()
    """The same model in fewer bits, the widest first: looked at where nothing fits."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UsageError(f"--weight is {self.weight}", expected="0 to 1")
        if self.demands.layers is not None and self.strategy != "custom":
            raise UsageError(f"--layers belongs to the strategy custom, not {self.strategy}")
        assert self.weights is None or not choice_fault(self.weights, self.profile), "sized for other weights"

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the question that a plan answers."""
        weight = 0.5 if plan.mixed_weight is None else plan.mixed_weight
        return cls(
            plan.profile, plan.cluster, plan.workload, plan.strategy, plan.objective, weight, plan.execution,
            plan.demands or NO_DEMANDS, plan.weights,
        )  # fmt: skip

    def packed(self, found: Packed) -> Self:
        """Return the question for the model with its weights packed."""
        return replace(self, profile=found.profile, weights=found.choice, narrower=())

    def by(self, strategy: Strategy) -> Self:
        """Return the question for another strategy: a cut belongs to `custom` alone, all other demands stay."""
        return replace(self, strategy=strategy, demands=self.demands.model_copy(update={"layers": None}))

    @property
    def terms(self) -> Terms:
        """The demands, read for these devices and this model; errors as `planner.problem.demands.read_demands`."""
        names = [device.name for device in self.cluster.devices]
        return read_demands(self.demands, names=names, num_layers=self.profile.model.num_hidden_layers)

    def problem(self) -> Problem:
        """Return the question in integers."""
        terms = self.terms
        return build_problem(
            self.profile,
            workload=self.workload,
            cluster=self.cluster,
            execution=self.execution,
            rules=terms.rules,
            keep_order=terms.keep_order,
            use_all=self.demands.use_all,
        )
