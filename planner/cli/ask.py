"""What several commands check before they ask the planner."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.options import OfferOptions, WorkloadOptions
from plans.commands.console import Output
from plans.errors import UsageError, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from planner.measure.known import Known
    from plans.checkpoint.units import Checkpoint
    from plans.cluster import Cluster
    from plans.profile import ModelProfile
    from plans.workload import Workload

AUTO = "auto"


def refuse_inside(output: Path | None, folder: Path | None) -> None:
    """Refuse to write a result into the checkpoint it was made from."""
    if output is not None and folder is not None and output.absolute().parent.resolve() == folder.resolve():
        raise UsageError(f"--output {output} lies inside the checkpoint", hint="choose another folder")


def is_plan(target: str) -> bool:
    """Whether a command was given a plan, and not a model; a file that is no JSON is neither and refused as such."""
    from plans.reading.strict import read_json

    path = Path(target)
    if path.suffix != ".json" or not path.is_file():
        return False
    document = read_json(path)
    return isinstance(document, dict) and "stages" in document


def refuse_given(why: str, *groups: "DataclassInstance") -> None:
    """Refuse options of groups that were given although something else decides."""
    for group in groups:
        for field in fields(group):
            if getattr(group, field.name) not in (field.default, []):
                raise UsageError(f"{why}; --{field.name.replace('_', '-')} cannot change it", hint="leave it out")


def chunk_tokens(text: str | None) -> int | None:
    """Return the tokens of --prefill-chunk; None where the planner chooses, or where all are taken at once."""
    if text is None or text == AUTO:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= 2**31):
        raise UsageError(f"--prefill-chunk is {printable(text, limit=40)}", expected=f"1 to {2**31}, or auto")
    return int(text)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command is about, read from its model and options."""

    checkpoint: "Checkpoint"
    profile: "ModelProfile"
    workload: "Workload"
    cluster: "Cluster"
    origins: tuple[str, ...] = ()
    """In words, where the rates and times of this machine's devices are from."""


def read_asked(
    model: str,
    workload: WorkloadOptions,
    offer: OfferOptions,
    *,
    prefill_chunk_tokens: int | None,
    screen: Output,
    speed: str = "auto",
) -> Asked:
    """Read the model and the devices, and say what is odd about the checkpoint."""
    from planner.devices.clusters import load_cluster
    from planner.devices.machine import oversized_budgets
    from planner.model.find import find_model
    from planner.model.profile import build_profile
    from planner.model.workloads import context_warnings, make_workload, parse_dtype
    from plans.checkpoint.folder import open_checkpoint

    chosen, kv_chosen = parse_dtype(workload.dtype), parse_dtype(workload.kv_cache_dtype, option="--kv-cache-dtype")
    checkpoint = open_checkpoint(find_model(model))
    profile = build_profile(checkpoint, dtype=chosen, kv_cache_dtype=kv_chosen)
    load = make_workload(
        profile,
        ctx_size=workload.ctx_size,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        batch_size=workload.batch_size,
        requests_in_flight=workload.requests_in_flight,
        prefill_chunk_tokens=prefill_chunk_tokens,
    )
    for warning in checkpoint.warnings + context_warnings(profile, load):
        screen.warn(warning)
    offered = load_cluster(offer.cluster, devices=offer.device, margins=offer.margin)
    for warning in oversized_budgets(offer.device or ()):
        screen.warn(warning)
    if not offer.probe or offer.cluster is not None:
        return Asked(checkpoint, profile, load, offered)
    known = known_of(offered, profile, speed=speed, screen=screen)
    for origin in known.origins:
        screen.note(origin)
    return Asked(checkpoint, profile, load, known.cluster, known.origins)


def known_of(cluster: "Cluster", profile: "ModelProfile | None", *, speed: str, screen: Output) -> "Known":
    """Return the cluster with what is known of this machine, and warn where that may be wrong."""
    from planner.measure.known import with_known

    with screen.spinner("looking at this machine"):
        known = with_known(cluster, profile=profile, speed=speed)
    for warning in known.warnings:
        screen.warn(warning)
    return known
