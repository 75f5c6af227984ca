"""`llamaplan export`, `verify` and `emit`: they parse, call the exporter, and print."""

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import options
from planner.cli.next_steps import after_export, shown
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups

if TYPE_CHECKING:
    from exporter.foreign.opening import Form
    from exporter.foreign.origin import Origin
    from exporter.verify import Verified
    from plans.export.manifest import Manifest
    from plans.plan import Plan

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by 'llamaplan export'.")]
StageOption = Annotated[
    list[int] | None,
    typer.Option(
        "--stage", metavar="N", help="Only this stage, counted from 0 (its file is model-0000(N+1)-of-...); repeatable."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("export")(export_command)
    app.command("verify")(verify_command)
    app.command("emit")(emit_command)


@with_option_groups
def export_command(
    plan: options.PlanArgument,
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
    requantise: Annotated[
        str | None,
        typer.Option(
            "--requantise",
            metavar="FORM",
            help="Of a GGUF file: bf16 (everything) or int8 (what has no packed form, such as Q4_K).",
        ),
    ] = None,
    as_stored: Annotated[
        bool, typer.Option("--as-stored", help="Leave weights of GPTQ, AWQ or W8A8 in their own format.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    calibration_text: Annotated[
        Path | None,
        typer.Option(
            "--calibration-text",
            metavar="FILE",
            help="Round the weights of a plan with int4 or int8 so that what this text makes of them changes least.",
        ),
    ] = None,
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Also name tensors that hold NaN or infinity, or only zeros.")
    ] = False,
    printed: ScreenOptions,
) -> None:
    """Write one safetensors file per stage, in a folder that is itself a Hugging Face checkpoint.

    Example: llamaplan export plan.json --model my-model/ -o shards/
    """
    from exporter.foreign.opening import open_origin
    from exporter.write import export
    from planner.model.find import find_model
    from plans.check import read_plan

    screen = printed.output()
    checked = read_plan(plan)
    stages = choose_stages(checked, host=host, stage=stage)
    source = find_model(model)
    origin = open_origin(source, form=chosen_form(requantise, as_stored=as_stored))
    checked = cut_again(checked, origin, screen)
    if check_values:
        warn_about_values(origin, screen)
    with screen.progress("export", unit="bytes") as progress:
        manifest = export(
            checked,
            model=origin,
            output=output,
            dtype=dtype,
            stages=stages,
            force=force,
            calibrate_on=calibration_text,
            progress=progress,
            calibrating=partial(progress, what="calibrate"),
            warn=screen.warn,
            note=screen.note,
        )
    for line in stage_lines(manifest, stages):
        screen.show(line)
    for line in packing_lines(manifest):
        screen.show(line)
    screen.show(f"export id {manifest.export_id}")
    screen.data(manifest.model_dump(mode="json"))
    if stages is None:
        screen.next_step(after_export(checked, output))
    else:
        chosen = " ".join(f"--stage {index}" for index in sorted(stages))
        screen.next_step(f"llamaplan verify {shown(output)} {chosen}")


def stage_lines(manifest: "Manifest", stages: frozenset[int] | None) -> Iterator[str]:
    """Yield one line per stage that was written: file, size, device, units."""
    from plans.reading.sizes import format_bytes

    for index, stage in enumerate(manifest.stages):
        if stages is not None and index not in stages:
            continue
        size = format_bytes(manifest.file(stage.file).size)
        yield f"{stage.file}  {size:>10}  {stage.device}: {stage.range.words}"


def packing_lines(manifest: "Manifest") -> Iterator[str]:
    """Yield what was packed how, and how far it is from what it was; nothing where weights are as they were."""
    packing = manifest.packing
    if packing is None:
        return
    how = "rounded to nearest"
    if packing.text is not None:
        how = f"calibrated on {packing.text.num_tokens} tokens"
    for scheme in sorted({unit.scheme for unit in packing.units}):
        units = [unit for unit in packing.units if unit.scheme == scheme]
        worst = max(units, key=lambda unit: unit.relative_squared_error)
        name = f"layer {worst.index}" if worst.kind == "layer" else "the head"
        error = worst.relative_squared_error**0.5
        yield (
            f"{scheme}: {sum(unit.num_matrices for unit in units)} matrices {how}; weights of {name} moved most, "
            f"by {error:.2g} of their size"
        )


@with_option_groups
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
    printed: ScreenOptions,
) -> None:
    """Read an export back: every byte against its manifest, and every tensor against the model if given.

    Example: llamaplan verify shards/ --model my-model/
    """
    from dataclasses import asdict

    from exporter.verify import verify
    from planner.model.find import find_model
    from plans.check import read_plan
    from plans.export.manifest import PLAN_NAME
    from plans.reading.sizes import format_bytes

    screen = printed.output()
    source = find_model(model) if model is not None else None
    with screen.progress("verify", unit="bytes") as progress:
        found = verify(directory, model=source, stage=stage, expect_id=expect_id, progress=progress)
    for text in found.warnings:
        screen.warn(text)
    compared = f", {compared_words(found)}" if source is not None else ""
    screen.show(
        f"intact: {len(found.stages)} of {found.num_stages} stages, {found.num_files} files, "
        f"{format_bytes(found.num_bytes)}{compared}"
    )
    screen.show(f"export id {found.export_id}")
    screen.data(asdict(found))
    if len(found.stages) == found.num_stages:
        screen.next_step(after_export(read_plan(directory / PLAN_NAME), directory))


def compared_words(found: "Verified") -> str:
    """Return in what way an export was found to be the model's."""
    if found.method is None:
        return f"{found.num_tensors_compared} tensors equal to the model's"
    how = {
        "nearest": "the packed ones equal to the model's rounded again",
        "gptq": "the packed ones as far from the model's as the manifest says",
    }
    return f"{found.num_tensors_compared} tensors compared with the model's, {how[found.method]}"


@with_option_groups
def emit_command(
    plan: options.PlanArgument,
    *,
    engine: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="vllm, sglang, tensorrt-llm, accelerate, transformers, llama.cpp or torchrun (our own runtime).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PATH", help="File to write, or folder for torchrun's scripts."),
    ] = None,
    directory: Annotated[
        str,
        typer.Option(
            "--directory", metavar="DIR", help="The export (or the .gguf file), as the commands should name it."
        ),
    ] = "DIR",
    printed: ScreenOptions,
) -> None:
    """Write a plan as another engine takes it, with the exact command; what it cannot express is said.

    Example: llamaplan emit plan.json --for vllm --directory shards/ -o serve.sh
    """
    from dataclasses import asdict

    from exporter.emit import emit
    from plans.check import read_plan

    screen = printed.output()
    found = emit(read_plan(plan), engine=engine, directory=directory)
    for text in found.not_expressed:
        screen.warn(f"{engine}: {text}")
    if output is not None:
        written = write_emitted(found.files, output)
        screen.note("wrote " + ", ".join(map(str, written)))
    elif not printed.as_json:
        sys.stdout.write("\n".join(found.files.values()))
    screen.data(asdict(found))
    if engine == "accelerate":
        path = str(written[0]) if output is not None else "device_map.json"
        load = f"AutoModelForCausalLM.from_pretrained({directory!r}, device_map=json.load(open({path!r})))"
        screen.next_step(load)
    elif output is not None:
        interpreter = "python" if engine == "transformers" else "sh"
        screen.next_step(f"{interpreter} {shown(written[0])}")


def write_emitted(files: Mapping[str, str], output: Path) -> list[Path]:
    """Write one file to `output`, or several into the folder `output`; return their paths."""
    from plans.reading.files import write_text

    if len(files) == 1 and not output.is_dir():
        write_text(output, next(iter(files.values())))
        return [output]
    output.mkdir(exist_ok=True)
    for name, text in files.items():
        write_text(output / name, text)
    return [output / name for name in files]


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


def chosen_form(text: str | None, *, as_stored: bool) -> "Form | None":
    """Return what --requantise and --as-stored say of quantised weights; None for the usual way.

    Raises:
        UsageError: something that is not known, or both.
    """
    from exporter.foreign.opening import FORMS
    from plans.errors import UsageError, printable

    if text is None:
        return "as stored" if as_stored else None
    found = next((form for form in FORMS if form == text and form != "as stored"), None)
    if found is None or as_stored:
        both = "--requantise and --as-stored exclude each other"
        unknown = f"--requantise {printable(text, limit=40)} is not known; bf16 and int8 are"
        raise UsageError(both if found else unknown)
    return found


def cut_again(plan: "Plan", origin: "Origin", screen: Output) -> "Plan":
    """Return the plan for what the weights become, where it was made for another form of them.

    Raises:
        IntegrityError: the plan was made for another model.
        InfeasibleError: what they become does not fit.
    """
    from planner.answers.recut import recut
    from planner.model.profile import build_profile
    from plans.checkpoint.names import UnitKey
    from plans.checkpoint.units import check_same_shapes, unit_tables
    from plans.reading.sizes import format_bytes

    recorded: dict[UnitKey, str] = {(unit.kind, unit.index): unit.shapes_sha256 for unit in plan.profile.units}
    if origin.stored is None or recorded == {t.key: t.shapes_sha256 for t in unit_tables(origin.checkpoint)}:
        return plan
    check_same_shapes(recorded, origin.stored)
    found = recut(plan, build_profile(origin.checkpoint))
    before, now = plan.profile.total_weight_bytes, found.profile.total_weight_bytes
    screen.note(
        f"{format_bytes(before)} of weights become {format_bytes(now)}: the plan is costed anew, cut the same way"
    )
    return found


def warn_about_values(origin: "Origin", screen: Output) -> None:
    """Warn about every tensor of a checkpoint that holds NaN or infinity, or nothing but zeros."""
    from exporter.values import find_bad_values

    for name, what in find_bad_values(origin).items():
        screen.warn(f"{name} {what}")
