"""The plan: stages in chain order, what was predicted for them, and what was proved."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from plans.cluster import Cluster, Name, Seconds
from plans.packed.choice import AS_STORED, WeightChoice
from plans.profile import Count, ModelProfile
from plans.reading.files import sha256_hex
from plans.reading.strict import SchemaVersion, StrictModel
from plans.stages import StageRange
from plans.workload import Workload

Strategy = Literal["uniform", "memory", "compute", "mixed", "custom"]
Objective = Literal["latency", "request", "throughput"]
Execution = Literal["one_process", "process_per_stage"]
SolveStatus = Literal["optimal", "feasible", "infeasible", "time_limit", "given"]
Share = Annotated[float, Field(ge=0)]


class Stage(StrictModel):
    """A contiguous run of units on one device; layers are the half-open range [start_layer, end_layer)."""

    device: Name
    start_layer: Count
    end_layer: Count
    has_embedding: bool
    has_head: bool
    weight_bytes: Count
    kv_cache_bytes: Count
    activation_bytes: Count
    overhead_bytes: Count
    budget_bytes: Count
    decode_seconds: Seconds
    prefill_seconds: Seconds
    hop_seconds: Seconds
    """Time to move one decode step's hidden states to the next stage; 0 for the last stage."""

    @property
    def range(self) -> StageRange:
        """Which units it holds."""
        return StageRange(self.device, self.start_layer, self.end_layer, self.has_embedding, self.has_head)

    @property
    def total_bytes(self) -> int:
        """Everything the stage needs on its device."""
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes + self.overhead_bytes


class Prediction(StrictModel):
    """What the cost model predicts for the whole chain."""

    time_to_first_token_seconds: Seconds
    seconds_per_token: Seconds
    return_hop_seconds: Seconds
    tokens_per_second: Share
    pipelined_tokens_per_second: Share
    max_memory_share: Share
    """The largest used/budget over the stages."""


class TradeOff(StrictModel):
    """What `mixed` weighed: the best each goal could do alone, and how far the plan is from it (0.1 = 10 % worse)."""

    best_time_seconds: Seconds
    best_memory_share: Share
    time_given_up: float
    memory_share_given_up: float


class Proof(StrictModel):
    """What is known about the objective value."""

    status: SolveStatus
    objective: float
    """Seconds for `compute`, a share for `memory`, the weighted sum for `mixed`, seconds per token otherwise."""
    bound: float
    """No plan can be below this."""
    gap: Annotated[float, Field(ge=0)]
    solver: str
    solver_version: str
    certified_by: str | None
    """The independent method that proved the optimum again, or null."""


class Demands(StrictModel):
    """What the user fixed by hand, as it was written: the options of the same names, see `planner.problem.demands`."""

    pins: tuple[str, ...] = ()
    bans: tuple[str, ...] = ()
    layers: str | None = None
    """The cut of the strategy custom."""
    keep_order: bool = False
    """Stages follow the order in which the devices are listed."""
    use_all: bool = False
    """Every device gets a stage."""


NO_DEMANDS = Demands()


def choice_fault(choice: WeightChoice, profile: ModelProfile) -> str:
    """Return where a profile's units are not packed as the choice says; empty where they are.

    A unit none of whose matrices can be packed stays as it is, whatever was chosen for it.
    """
    if len(choice.layer_bits) != len(profile.layers):
        return f"weights speak of {len(choice.layer_bits)} layers, the profile has {len(profile.layers)}"
    bits = (AS_STORED, *choice.layer_bits, choice.head_bits)
    for unit, wanted in zip(profile.units, bits, strict=True):
        if unit.weights is not None and unit.weights != f"int{wanted}":
            name = f"layer {unit.index}" if unit.kind == "layer" else f"the {unit.kind}"
            return f"weights give {name} {wanted} bits, the profile sizes it as {unit.weights}"
    return ""


class Plan(StrictModel):
    """What `llamaplan solve` writes; it holds everything needed to recompute its own numbers."""

    schema_version: SchemaVersion = 1
    strategy: Strategy
    objective: Objective
    mixed_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    execution: Execution = "one_process"
    demands: Demands | None = None
    """Absent where the user fixed nothing."""
    weights: WeightChoice | None = None
    """How many bits the weights are exported in; absent where they stay as they are stored."""
    workload: Workload
    cluster: Cluster
    profile: ModelProfile
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    prediction: Prediction
    trade_off: TradeOff | None = None
    proof: Proof

    @model_validator(mode="after")
    def _mixed_has_a_weight(self) -> "Plan":
        if (self.strategy == "mixed") != (self.mixed_weight is not None):
            raise ValueError("mixed_weight belongs to the strategy mixed, and only to it")
        return self

    @model_validator(mode="after")
    def _demands_demand_something(self) -> "Plan":
        if self.demands == NO_DEMANDS:
            raise ValueError("demands that fix nothing are left out")
        if self.demands is not None and self.demands.layers is not None and self.strategy != "custom":
            raise ValueError("demands.layers belongs to the strategy custom")
        return self

    @model_validator(mode="after")
    def _weights_are_those_of_the_profile(self) -> "Plan":
        if self.weights is not None and (fault := choice_fault(self.weights, self.profile)):
            raise ValueError(fault)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {k: v for k, v in written.items() if v is not None or k not in ("demands", "weights")}

    @property
    def sha256(self) -> str:
        """Hash of the plan's canonical bytes."""
        return sha256_hex(self.to_json().encode())

    @property
    def ranges(self) -> tuple[StageRange, ...]:
        """Which units the stages hold, in chain order."""
        return tuple(stage.range for stage in self.stages)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of layers per stage, in chain order."""
        return tuple(stage.num_layers for stage in self.ranges)
