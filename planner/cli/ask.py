"""What several commands check before they ask the planner."""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.options import AnyWeightOptions, OfferOptions, WeightOptions, WorkloadOptions
from plans.commands.console import Output
from plans.errors import UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from _typeshed import DataclassInstance

    from planner.measure.known import Known
    from planner.model.widths import Packed
    from plans.checkpoint.units import Checkpoint
    from plans.cluster import Cluster
    from plans.dtypes import DtypeName
    from plans.packed.choice import WeightChoice
    from plans.profile import ModelProfile, PackedName
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
    weights: "WeightChoice | None" = None
    """What the profile was sized for."""
    narrower: "tuple[Packed, ...]" = ()
    """The model in fewer bits."""


def read_asked(
    model: str,
    workload: WorkloadOptions,
    offer: OfferOptions,
    *,
    weights: WeightOptions | AnyWeightOptions | None = None,
    prefill_chunk_tokens: int | None,
    screen: Output,
    speed: str = "auto",
) -> Asked:
    """Read the model and the devices, and say what is odd about the checkpoint."""
    from planner.devices.clusters import load_cluster
    from planner.devices.machine import oversized_budgets
    from planner.model.find import find_model
    from planner.model.workloads import context_warnings, make_workload, parse_dtype
    from plans.checkpoint.folder import open_checkpoint

    chosen, kv_chosen = parse_dtype(workload.dtype), parse_dtype(workload.kv_cache_dtype, option="--kv-cache-dtype")
    checkpoint = open_checkpoint(find_model(model))
    sized = read_widths(checkpoint, weights or WeightOptions(), dtype=chosen, kv_cache_dtype=kv_chosen)
    warn_of_unpacked(checkpoint, sized.choice, screen)
    profile = sized.profile
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
    asked = Asked(checkpoint, profile, load, offered, weights=sized.choice, narrower=sized.narrower)
    narrower = sized.narrower if weights is not None and weights.weights == "auto" else ()
    profiles = (profile, *(found.profile for found in narrower))
    if not offer.probe or offer.cluster is not None:
        note_unmeasured(offered, profiles, model, screen)
        return asked
    widths = {layer.weights for found in narrower for layer in found.profile.layers}
    known = known_of(offered, profile, widths=widths, speed=speed, screen=screen)
    for origin in known.origins:
        screen.note(origin)
    note_unmeasured(known.cluster, profiles, model, screen)
    return replace(asked, cluster=known.cluster, origins=known.origins)


def note_unmeasured(cluster: "Cluster", profiles: "Sequence[ModelProfile]", model: str, screen: Output) -> None:
    """Say which widths are estimated on devices that were measured in others: the two are not known alike."""
    from planner.timing.unit_times import unmeasured_widths

    found = {device.name: unmeasured_widths(device, profiles) for device in cluster.devices}
    names = [name for name, (timed, missing) in found.items() if timed and missing]
    if not names:
        return
    timed, missing = (sorted(set().union(*(found[name][part] for name in names))) for part in (0, 1))
    width = missing[0] if missing in (["int4"], ["int8"]) else "auto"
    more = ["--weights", width] if {"int4", "int8"} & set(missing) else []
    again = shlex.join(["llamaplan", "devices", model, "--measure", *more])
    screen.note(
        f"{', '.join(names)}: times of layers in {' and '.join(missing)} are estimates, those in {' and '.join(timed)} "
        f"were measured; {again} measures them"
    )


@dataclass(frozen=True, slots=True)
class Widths:
    """A model, sized for the weights that were asked for."""

    profile: "ModelProfile"
    choice: "WeightChoice | None"
    narrower: "tuple[Packed, ...]"
    """The same in fewer bits; none where it cannot be packed."""


def read_widths(
    checkpoint: "Checkpoint",
    weights: WeightOptions | AnyWeightOptions,
    *,
    dtype: "DtypeName | None",
    kv_cache_dtype: "DtypeName | None" = None,
) -> Widths:
    """Size a model for `--weights`; for `auto` as it is stored.

    Raises:
        UsageError: (E-WEIGHTS) the checkpoint cannot be packed.
    """
    from planner.model.profile import build_profile
    from planner.model.widths import as_asked, narrower_than

    plain, head = build_profile(checkpoint, dtype=dtype, kv_cache_dtype=kv_cache_dtype), weights.head_weights
    chosen = as_asked(checkpoint, plain, weights=weights.weights, head=head)
    choice = None if chosen is None else chosen.choice
    narrower = narrower_than(checkpoint, plain, choice, head=head)
    return Widths(plain if chosen is None else chosen.profile, choice, narrower)


def warn_of_unpacked(checkpoint: "Checkpoint", choice: "WeightChoice | None", screen: Output) -> None:
    """Say which matrices stay as they are although their layers are packed."""
    from planner.model.packed import unpacked_lines
    from planner.model.profile import unit_rows

    for line in () if choice is None else unpacked_lines(unit_rows(checkpoint), choice):
        screen.warn(line)


def known_of(
    cluster: "Cluster",
    profile: "ModelProfile | None",
    *,
    widths: "Collection[PackedName | None]" = (),
    speed: str,
    screen: Output,
) -> "Known":
    """Return the cluster with what is known of this machine, and warn where that may be wrong."""
    from planner.measure.known import with_known

    with screen.spinner("looking at this machine"):
        known = with_known(cluster, profile=profile, widths=widths, speed=speed)
    for warning in known.warnings:
        screen.warn(warning)
    return known
