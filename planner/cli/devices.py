"""`llamaplan devices`: what is there, and with --measure how fast it is."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import ask, options
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError

if TYPE_CHECKING:
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
    if not measure and (model or host or dtype or threads):
        raise UsageError("MODEL, --host, --dtype and --threads belong to --measure", hint="add --measure")
    offered = load_cluster(cluster, devices=device, margins=margin)
    for warning in oversized_budgets(device or ()):
        screen.warn(warning)
    origins: tuple[str, ...] = ()
    if measure:
        offered = measured(offered, screen, model=model, host=host, dtype=dtype, threads=threads, is_kept=probe)
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
    links = show_cluster.link_table(offered)
    if links is not None:
        screen.show("")
        screen.show(links)
    described = ["--cluster", str(output or cluster)] if output or cluster else []
    described += [word for name in device or () for word in ("--device", name)] if not described else []
    screen.next_step(shlex.join(["llamaplan", "solve", model or "MODEL", *described, "-o", "plan.json"]))


def measured(
    cluster: "Cluster",
    screen: Output,
    *,
    model: str | None,
    host: str | None,
    dtype: str | None,
    threads: int | None,
    is_kept: bool,
) -> "Cluster":
    """Time the devices of this machine and return the cluster with their curves.

    They are remembered for this machine and model shape, unless the threads are not those that a run would have.
    """
    from planner.measure.cluster import measure_cluster
    from planner.measure.known import remember_measurement
    from planner.model.find import find_model
    from planner.model.profile import build_profile
    from planner.model.workloads import parse_dtype
    from plans.checkpoint.folder import open_checkpoint
    from plans.checkpoint.units import require_full

    chosen = parse_dtype(dtype)
    checkpoint = open_checkpoint(find_model(model)) if model is not None else None
    if checkpoint is not None and checkpoint.has_weights:
        require_full(checkpoint)
    with screen.progress() as bar:
        found = measure_cluster(
            cluster,
            checkpoint=checkpoint,
            dtype=chosen,
            host=host,
            threads=threads,
            progress=lambda what, done, total: bar(done, total, what=what),
        )
    for warning in found.warnings:
        screen.warn(warning)
    screen.note(f"timed {', '.join(found.measured)}")
    is_kept = is_kept and threads is None and checkpoint is not None
    if checkpoint is not None and is_kept and remember_measurement(found, build_profile(checkpoint, dtype=chosen)):
        screen.note("remembered: solve uses these times on this machine; --no-probe plans without")
    return found.cluster
