"""`llamaplan devices`: what is there, and with --measure how fast it is."""

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli import ask, options
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError

if TYPE_CHECKING:
    from planner.model.widths import Asked as AnyWidth
    from planner.model.widths import Packed
    from plans.cluster import Cluster

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="With --measure: the checkpoint or bare config.json whose layers are timed.",
        show_default=False,
    ),
]
MeasureOption = Annotated[
    bool, typer.Option("--measure", help="Time real layers on the devices of this machine; takes a minute or more.")
]
MeasuredWeightsOption = Annotated[
    Literal["bf16", "int8", "int4", "auto"] | None,
    typer.Option(
        "--weights",
        help="With --measure: the width whose layers are timed, beside those timed before; auto: bf16, int8 and int4, "
        "all that 'solve --weights auto' chooses from; unset: as stored.",
        show_default=False,
    ),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host", metavar="NAME", help="With --measure: which host of the cluster this machine is.", show_default=False
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, help="With --measure: CPU threads; unset: torch's default.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("devices")(devices_command)


@with_option_groups
def devices_command(
    model: ModelArgument = None,
    *,
    device: options.DeviceOption = None,
    cluster: options.ClusterOption = None,
    margin: options.MarginOption = None,
    probe: options.ProbeOption = True,
    catalogue: Annotated[bool, typer.Option("--catalogue", help="List common accelerators by name.")] = False,
    measure: MeasureOption = False,
    host: HostOption = None,
    dtype: options.DtypeOption = None,
    weights: MeasuredWeightsOption = None,
    threads: ThreadsOption = None,
    output: options.OutputOption = None,
    printed: ScreenOptions,
) -> None:
    """Say what this machine, or a described cluster, offers to a plan; with --measure, time it.

    Example: llamaplan devices --device 2xrtx4090 --device cpu=32GiB -o cluster.json
    """
    from planner.devices.clusters import load_cluster
    from planner.devices.machine import inspect_machine, oversized_budgets
    from planner.show import cluster as show_cluster
    from plans.reading.files import write_text

    screen = printed.output()
    if catalogue:
        if device or cluster or margin or output or measure or model:
            raise UsageError("--catalogue lists accelerators and takes no model, devices, cluster, margin or output")
        screen.data(show_cluster.catalogue_json())
        screen.show(show_cluster.catalogue_table())
        screen.next_step("llamaplan devices --device NAME -o cluster.json")
        return
    if not measure and (model or host or dtype or threads or weights):
        raise UsageError("MODEL, --host, --dtype, --weights and --threads belong to --measure", hint="add --measure")
    if weights and not model:
        raise UsageError("--weights says what the layers of MODEL are packed to", hint="name a model")
    offered = load_cluster(cluster, devices=device, margins=margin)
    for warning in oversized_budgets(device or ()):
        screen.warn(warning)
    origins: tuple[str, ...] = ()
    if measure:
        what = Measurement(model, host=host, dtype=dtype, weights=weights, threads=threads)
        offered = measured(offered, what, screen, is_kept=probe)
    elif probe and cluster is None:
        known = ask.known_of(offered, None, speed="auto", screen=screen)
        offered, origins = known.cluster, known.origins
    if output is not None:
        write_text(output, offered.to_json())
        screen.note(f"wrote {output}")
    screen.data(offered.model_dump(mode="json", by_alias=True))
    screen.show(show_cluster.device_table(offered))
    if not (printed.as_json or device or cluster):
        for line in show_cluster.machine_lines(inspect_machine(), origins=origins):
            screen.show(line)
    for line in show_cluster.timing_lines(offered):
        screen.show(line)
    for line in show_cluster.bus_lines(offered):
        screen.show(line)
    links = show_cluster.link_table(offered)
    if links is not None:
        screen.show("")
        screen.show(links)
    described = ["--cluster", str(output or cluster)] if output or cluster else []
    described += [word for name in device or () for word in ("--device", name)] if not described else []
    described += ["--weights", weights] if weights else []
    screen.next_step(shlex.join(["llamaplan", "solve", model or "MODEL", *described, "-o", "plan.json"]))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is timed, as it was asked for."""

    model: str | None
    host: str | None
    dtype: str | None
    weights: "AnyWidth | None"
    threads: int | None


def measured(cluster: "Cluster", what: Measurement, screen: Output, *, is_kept: bool) -> "Cluster":
    """Time the devices of this machine and return the cluster with their curves.

    They are remembered for this machine and model shape, unless the threads are not those that a run would have.
    """
    from planner.measure.cluster import measure_cluster
    from planner.measure.known import remember_measurement
    from planner.model.find import find_model
    from planner.model.profile import build_profile
    from planner.model.widths import measured_as
    from planner.model.workloads import parse_dtype
    from plans.checkpoint.folder import open_checkpoint
    from plans.checkpoint.units import require_full

    dtype = parse_dtype(what.dtype)
    checkpoint = open_checkpoint(find_model(what.model)) if what.model is not None else None
    if checkpoint is not None and checkpoint.has_weights:
        require_full(checkpoint)
    plain = None if checkpoint is None else build_profile(checkpoint, dtype=dtype)
    widths: tuple[Packed | None, ...] = (None,)
    if checkpoint is not None and plain is not None:
        widths = measured_as(checkpoint, plain, weights=what.weights)
        ask.warn_of_unpacked(checkpoint, next((w.choice for w in widths if w is not None), None), screen)
    with screen.progress() as bar:
        found = measure_cluster(
            cluster,
            checkpoint=checkpoint,
            dtype=dtype,
            widths=widths,
            host=what.host,
            threads=what.threads,
            progress=lambda what, done, total: bar(done, total, what=what),
        )
    for warning in found.warnings:
        screen.warn(warning)
    screen.note(f"timed {', '.join(found.measured)}")
    if plain is not None and is_kept and what.threads is None and remember_measurement(found, plain):
        screen.note("remembered: solve uses these times on this machine; --no-probe plans without")
    return found.cluster
