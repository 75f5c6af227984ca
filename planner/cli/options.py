"""Command-line options that several commands share, so that they are spelled and explained once."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plans.errors import UsageError

if TYPE_CHECKING:
    from planner.program.effort import Effort
    from plans.plan import Demands

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint folder, .gguf file (of a split one the first), bare config.json, or org/name in the local "
        "Hugging Face cache.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", metavar="TOKENS", help="Context the KV cache is sized for.", show_default=False),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences per batch.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="bf16, fp16 or fp32; unset: as stored.", show_default=False),
]
WeightsOption = Annotated[
    Literal["bf16", "int8", "int4"] | None,
    typer.Option(
        "--weights",
        help="What the layers' matrices are packed to; bf16: not packed, in --dtype; unset: as stored.",
        show_default=False,
    ),
]
AnyWeightsOption = Annotated[
    Literal["bf16", "int8", "int4", "auto"] | None,
    typer.Option(
        "--weights",
        help="What the layers' matrices are packed to; bf16: not packed, in --dtype; auto: the widest that fits, or "
        "with --sensitivity the fastest mix of int8 and int4 within --max-error; unset: as stored.",
        show_default=False,
    ),
]
HeadWeightsOption = Annotated[
    Literal["bf16", "int8"] | None,
    typer.Option(
        "--head-weights",
        help="The same of a head with a table of its own; unset: int8 where the layers are packed.",
        show_default=False,
    ),
]
SensitivityOption = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="What fewer bits cost this model, layer by layer: what 'llamaplan sensitivity' wrote.",
        show_default=False,
    ),
]
MaxErrorOption = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="KL",
        help="With --weights auto and --sensitivity: the most error that is accepted, as mean KL per token.",
        show_default=False,
    ),
]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype", metavar="DTYPE", help="Dtype of the KV cache; unset: as --dtype.", show_default=False
    ),
]
PromptTokensOption = Annotated[
    int | None, typer.Option("--prompt-tokens", metavar="TOKENS", help="Length of the prompt.", show_default=False)
]
InFlightOption = Annotated[
    int, typer.Option("--requests-in-flight", min=1, max=65536, help="Batches in the pipeline at once.")
]
PrefillChunkOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        metavar="TOKENS",
        min=1,
        help="Prompt tokens per step; unset: all at once.",
        show_default=False,
    ),
]
SpeedOption = Annotated[
    Literal["auto", "reference"],
    typer.Option(
        "--speed",
        help="As for llamarun: which measured curves count, those of the path it takes or of transformers' code.",
    ),
]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="Cluster file.", show_default=False)
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="NAME[=SIZE]",
        help="A device and its budget: cpu=16GiB, cuda:0=20GiB, 2xrtx4090; repeatable.",
        show_default=False,
    ),
]
MarginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--margin",
        metavar="[NAME=]AMOUNT",
        help="Memory to leave free: 10%, 2GiB, cuda:0=2GiB, cpu=20%; repeatable.",
        show_default=False,
    ),
]
ProbeOption = Annotated[
    bool,
    typer.Option(
        "--probe/--no-probe",
        envvar="LLAMAPLAN_PROBE",
        help="For devices of this machine: look at it for half a second, once, and use what --measure found here.",
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON file here.", show_default=False)
]
StrategyOption = Annotated[
    Literal["uniform", "memory", "compute", "mixed", "custom"] | None,
    typer.Option("--strategy", help="What to minimise; unset: compute, or custom with --layers.", show_default=False),
]
ObjectiveOption = Annotated[
    Literal["latency", "request", "throughput"],
    typer.Option("--objective", help="Which time: per token, of a whole request, or per step with requests in flight."),
]
ExecutionOption = Annotated[
    Literal["one_process", "process_per_stage"], typer.Option("--execution", help="Where the stages will run.")
]
WeightOption = Annotated[float, typer.Option("--weight", metavar="0..1", help="Of time, in the strategy mixed.")]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="CUT",
        help="18,10,4 over the devices in their order (* leaves one open), or 0-16@cuda:0,16-32@cpu.",
        show_default=False,
    ),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin", metavar="UNITS@DEVICE", help="0-4@cuda:0, embedding@cpu, head@cpu; repeatable.", show_default=False
    ),
]
BanOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ban",
        metavar="DEVICE",
        help="Not this device; 0-4@cpu: not these layers there; repeatable.",
        show_default=False,
    ),
]
NewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--new-tokens", "--max-tokens", "--max-new-tokens", "-n", metavar="TOKENS", help="Tokens to generate.",
        show_default=False,
    ),
]  # fmt: skip
SolverOption = Annotated[
    Literal["auto", "highs", "cbc"], typer.Option("--solver", help="auto: HiGHS, and CBC where it fails.")
]
TimeLimitOption = Annotated[float, typer.Option("--time-limit", metavar="SECONDS", help="For the whole search.")]
GapOption = Annotated[
    float, typer.Option("--mip-gap", metavar="RATIO", help="Stop this close to the optimum; 0 proves it.")
]
MaxContextOption = Annotated[
    bool, typer.Option("--max-ctx", help="Also say the largest context this cut, and any cut, can hold.")
]
MaxInFlightOption = Annotated[
    bool, typer.Option("--max-in-flight", help="Also say the most requests in flight this cut, and any cut, can hold.")
]
ChunkOption = Annotated[
    str | None,
    typer.Option(
        "--prefill-chunk",
        metavar="TOKENS|auto",
        help="Prompt tokens per step; auto: for the earliest first token; unset: all at once.",
        show_default=False,
    ),
]
CalibrateOption = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        metavar="RUN",
        help="Correct the devices' times by a run: what llamarun generate or bench wrote with --json.",
        show_default=False,
    ),
]
KeepOrderOption = Annotated[bool, typer.Option("--keep-order", help="Stages follow the order of the devices.")]
UseAllOption = Annotated[bool, typer.Option("--use-all", help="Every device gets a stage.")]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan written by 'llamaplan solve'.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferOptions:
    """The devices on offer."""

    cluster: ClusterOption = None
    device: DeviceOption = None
    margin: MarginOption = None
    probe: ProbeOption = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """What is asked of the model, and in which dtypes."""

    ctx_size: ContextOption = None
    prompt_tokens: PromptTokensOption = None
    new_tokens: NewTokensOption = None
    batch_size: BatchOption = 1
    requests_in_flight: InFlightOption = 1
    dtype: DtypeOption = None
    kv_cache_dtype: KvDtypeOption = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOptions:
    """How the weights are stored when the model is exported."""

    weights: WeightsOption = None
    head_weights: HeadWeightsOption = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyWeightOptions:
    """The same, or left to the planner."""

    weights: AnyWeightsOption = None
    head_weights: HeadWeightsOption = None
    sensitivity: SensitivityOption = None
    max_error: MaxErrorOption = None

    def check(self) -> None:
        """Refuse options that say nothing without each other.

        Raises:
            UsageError: naming the option that is missing or out of place.
        """
        if self.sensitivity is not None and self.weights in (None, "bf16"):
            raise UsageError("--sensitivity says what fewer bits cost", hint="add --weights auto, int8 or int4")
        if self.max_error is not None and (self.weights != "auto" or self.sensitivity is None):
            raise UsageError("--max-error belongs to --weights auto with --sensitivity", hint="add them")
        if self.max_error is not None:
            check_number("--max-error", self.max_error, "0 or more", is_good=0 <= self.max_error < math.inf)


@dataclass(frozen=True, kw_only=True)
class DemandOptions:
    """What is fixed by hand."""

    pin: PinOption = None
    ban: BanOption = None
    keep_order: KeepOrderOption = False

    def demands(self) -> "Demands":
        """Return them as a plan records them."""
        from plans.plan import Demands

        return Demands(pins=tuple(self.pin or ()), bans=tuple(self.ban or ()), keep_order=self.keep_order)


@dataclass(frozen=True, kw_only=True)
class CutOptions(DemandOptions):
    """The same, and the cut itself."""

    layers: LayersOption = None
    use_all: UseAllOption = False

    def demands(self) -> "Demands":
        """Return them as a plan records them."""
        return DemandOptions.demands(self).model_copy(update={"layers": self.layers, "use_all": self.use_all})


def check_time_limit(seconds: float) -> None:
    """Refuse a time limit that is no time."""
    check_number("--time-limit", seconds, "above 0", is_good=0 < seconds < math.inf)


def check_number(option: str, value: float, expected: str, *, is_good: bool) -> None:
    """Refuse a value that is out of range."""
    if not is_good:
        raise UsageError(f"{option} is {value}", expected=expected)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a search may cost."""

    solver: SolverOption = "auto"
    time_limit: TimeLimitOption = 60.0

    def effort(self) -> "Effort":
        """Return it, checked.

        Raises:
            UsageError: a limit that is none.
        """
        from planner.program.effort import Effort

        check_time_limit(self.time_limit)
        return Effort(("highs", "cbc") if self.solver == "auto" else (self.solver,), self.time_limit)


@dataclass(frozen=True, kw_only=True)
class ExactSearchOptions(SearchOptions):
    """The same, and how close to the optimum it must come."""

    mip_gap: GapOption = 0.0

    def effort(self) -> "Effort":
        """Return it, checked; errors as `SearchOptions.effort`."""
        check_number("--mip-gap", self.mip_gap, "0 to below 1", is_good=0 <= self.mip_gap < 1)
        return replace(SearchOptions.effort(self), mip_gap=self.mip_gap)
