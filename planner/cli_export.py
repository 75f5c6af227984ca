"""`llamaplan export`, `verify` and `emit`: they parse, call the exporter, and print."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.console import Output

if TYPE_CHECKING:
    from plans.plan import Plan

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan written by 'llamaplan solve'.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by 'llamaplan export'.")]
StageOption = Annotated[
    list[int] | None,
    typer.Option(
        "--stage", metavar="N", help="Only this stage, counted from 0 (its file is model-0000(N+1)-of-...); repeatable."
    ),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, notes or hints.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("export")(export_command)
    app.command("verify")(verify_command)


def export_command(
    plan: PlanArgument,
    *,
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The checkpoint the plan was made for.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; without it the plan's dtype is kept.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="NAME", help="Only what this host of the plan needs.")
    ] = None,
    stage: StageOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Also name tensors that hold NaN or infinity, or only zeros.")
    ] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Write one safetensors file per stage, in a folder that is itself a Hugging Face checkpoint."""
    from exporter.write import export
    from planner.models import find_model
    from plans.check import read_plan
    from plans.sizes import format_bytes

    console = Output(json=json, quiet=quiet)
    checked = read_plan(plan)
    stages = choose_stages(checked, host=host, stage=stage)
    source = find_model(model)
    if check_values:
        warn_about_values(source, console)
    with progress_bar(console, "export") as progress:
        manifest = export(
            checked,
            model=source,
            output=output,
            dtype=dtype,
            stages=stages,
            force=force,
            progress=progress,
            warn=console.warn,
        )
    sizes = {file.path: file.size for file in manifest.files}
    for index, entry in enumerate(manifest.stages):
        if stages is None or index in stages:
            layers = f"layers {entry.start_layer}-{entry.end_layer - 1}" if entry.end_layer > entry.start_layer else ""
            parts = ["embedding"] * entry.has_embedding + [layers] * bool(layers) + ["head"] * entry.has_head
            console.show(f"{entry.file}  {format_bytes(sizes[entry.file]):>10}  {entry.device}: {', '.join(parts)}")
    console.show(f"export id {manifest.export_id}")
    console.data(manifest.model_dump(mode="json"))
    if checked.profile.tied and len(manifest.stages) > 1:
        console.note("the tied embedding table is in the first file and, as lm_head.weight, in the last")
    if stages is None:
        console.next_step(f"llamarun generate {shown(output)} -p 'Once upon a time'")
    else:
        options = " ".join(f"--stage {index}" for index in sorted(stages))
        console.next_step(f"llamaplan verify {shown(output)} {options}")


def verify_command(
    directory: FolderArgument,
    *,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Also compare every tensor with this checkpoint.")
    ] = None,
    stage: StageOption = None,
    expect_id: Annotated[
        str | None, typer.Option("--expect-id", metavar="ID", help="The export id it must have.")
    ] = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Read an export back: every byte against its manifest, and every tensor against the model if given."""
    from dataclasses import asdict

    from exporter.verify import verify
    from planner.models import find_model
    from plans.sizes import format_bytes

    console = Output(json=json, quiet=quiet)
    source = find_model(model) if model is not None else None
    with progress_bar(console, "verify") as progress:
        found = verify(directory, model=source, stage=stage, expect_id=expect_id, progress=progress)
    for text in found.warnings:
        console.warn(text)
    compared = f", {found.num_tensors_compared} tensors equal to the model's" if source is not None else ""
    console.show(
        f"intact: {len(found.stages)} of {found.num_stages} stages, {found.num_files} files, "
        f"{format_bytes(found.num_bytes)}{compared}"
    )
    console.show(f"export id {found.export_id}")
    console.data(asdict(found))
    console.next_step(f"llamarun generate {shown(directory)} -p 'Once upon a time'")


def choose_stages(plan: "Plan", *, host: str | None, stage: list[int] | None) -> frozenset[int] | None:
    """Return the stages that --host or --stage select; None for all.

    Raises:
        UsageError: no such host or stage, or both options.
    """
    from plans.errors import UsageError, printable

    if host is not None and stage:
        raise UsageError("--host and --stage exclude each other")
    if stage:
        return frozenset(stage)
    if host is None:
        return None
    hosts = [plan.cluster.device(entry.device).host for entry in plan.stages]
    chosen = frozenset(index for index, name in enumerate(hosts) if name == host)
    if not chosen:
        raise UsageError(f"no stage is on host '{printable(host)}'", expected=", ".join(dict.fromkeys(hosts)))
    return chosen


def warn_about_values(source: Path, console: Output) -> None:
    """Warn about every tensor of a checkpoint that holds NaN or infinity, or nothing but zeros."""
    from exporter.values import find_bad_values

    for name, what in find_bad_values(source).items():
        console.warn(f"{name} {what}")


def shown(path: Path) -> str:
    """Return a path as it can be pasted into a shell."""
    import shlex

    return shlex.quote(str(path))


@contextmanager
def progress_bar(console: Output, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr if somebody sees it, and yield what is to be called with (done, total)."""
    screen = console.progress_console
    if console.quiet or not screen.is_terminal:
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
