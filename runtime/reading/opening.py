"""What a command was given - an export, a plan with its checkpoint, or a plain checkpoint - as one thing to run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from plans.check import read_plan
from plans.checkpoint.folder import open_checkpoint
from plans.checkpoint.units import Checkpoint, Shard, StoredTensor, check_same_shapes, require_full
from plans.dtypes import DTYPES
from plans.errors import InputError, UsageError, printable
from plans.export.manifest import MANIFEST_NAME
from plans.export.opening import Export, check_unchanged, open_export
from plans.plan import Plan
from plans.reading.sizes import parse_count
from plans.stages import StageRange


@dataclass(frozen=True, slots=True)
class Source:
    """Something that can be loaded as a chain.

    Attributes:
        folder: where weights, configuration and tokenizer lie.
        checkpoint: the same folder, opened strictly.
        stages: the cut, in chain order.
        plan: the plan it was cut by; None for a plain checkpoint.
        export: the export it is; None when it runs straight from a checkpoint.
        dtype: dtype the plan or the export was made for; None keeps the checkpoint's.
        warnings: remarks for a person.
    """

    folder: Path
    checkpoint: Checkpoint
    stages: tuple[StageRange, ...]
    plan: Plan | None
    export: Export | None
    dtype: str | None
    warnings: tuple[str, ...]


def open_source(
    target: Path, *, model: Path | None, expect_id: str | None = None, only_stage: int | None = None
) -> Source:
    """Open what the command was given.

    Args:
        target: an export, a plan file, or a checkpoint folder (then everything runs as one stage on the CPU).
        model: the checkpoint, when `target` is a plan file.
        expect_id: the export id to insist on.
        only_stage: zero-based stage whose bundle must be here; None for all of them.

    Raises:
        UsageError: a plan without a model, or a model with something that is no plan.
        InputError, IntegrityError, MachineError: as the strict readers of each kind of file.
    """
    if target.is_file() and target.name != "config.json":
        return _open_plan(target, model)
    if model is not None:
        raise UsageError("--model belongs to a plan file", where=target, hint="leave --model out", code="E-USAGE")
    if (target / MANIFEST_NAME).is_file():
        return _open_export(target, expect_id, only_stage)
    if expect_id is not None:
        raise UsageError("--expect-id belongs to an export", where=target, code="E-USAGE")
    return _open_plain(target)


def check_sources_unchanged(source: Source) -> None:
    """At the end of a run: CPU weights were mapped, so a bundle that changed meanwhile makes the result worthless.

    Raises:
        IntegrityError: a bundle was changed, replaced or removed.
    """
    if source.export is not None:
        for index in source.export.bundles:
            check_unchanged(source.export, stage=index)


def _open_export(folder: Path, expect_id: str | None, only_stage: int | None) -> Source:
    export = open_export(folder, expect_id=expect_id, stage=only_stage)
    checkpoint = _checkpoint_of(export)
    return Source(
        folder=folder,
        checkpoint=checkpoint,
        stages=export.plan.ranges,
        plan=export.plan,
        export=export,
        # Where several dtypes are stored, the plan knows the one that runs.
        dtype=export.manifest.dtype if export.manifest.dtype in DTYPES else export.plan.profile.dtype,
        warnings=export.warnings + checkpoint.warnings,
    )


def _checkpoint_of(export: Export) -> Checkpoint:
    """Return what the bundles that lie here hold as a checkpoint; the others may be on other hosts.

    Whether the head is tied was found out when the plan was made, by comparing the weights.
    """
    shards = tuple(Shard(bundle.path.name, bundle.header) for bundle in export.bundles.values())
    tensors = {
        name: StoredTensor(shard.name, entry, name) for shard in shards for name, entry in shard.header.tensors.items()
    }
    config = replace(export.config, tie_word_embeddings=export.plan.profile.tied)
    return Checkpoint(export.directory, export.directory, config, shards, tensors, ())


def _open_plan(path: Path, model: Path | None) -> Source:
    if path.suffix == ".gguf":
        require_full(open_checkpoint(path))
    if path.suffix != ".json":
        raise InputError("is a file", where=path, expected="an export, a plan (.json) or a checkpoint folder")
    if model is None:
        raise UsageError("a plan needs the checkpoint it is for", where=path, hint="add --model CHECKPOINT")
    plan = read_plan(path)
    if plan.weights is not None:
        raise UsageError(
            f"the plan is for weights packed to {plan.weights.words}, the checkpoint holds them as they are",
            where=path,
            hint=f"pack them: llamaplan export {printable(path)} --model {printable(model)} -o shards/",
            code="E-WEIGHTS",
        )
    checkpoint = open_checkpoint(model)
    folder = require_full(checkpoint)
    check_same_shapes({(unit.kind, unit.index): unit.shapes_sha256 for unit in plan.profile.units}, checkpoint)
    revision: tuple[str, ...] = ()
    if plan.profile.model.config_sha256 != checkpoint.config.sha256:
        revision = ("the plan was made for another revision of this model; the shapes are the same",)
    return Source(folder, checkpoint, plan.ranges, plan, None, plan.workload.dtype, checkpoint.warnings + revision)


def _open_plain(folder: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    require_full(checkpoint)
    whole = StageRange.whole(checkpoint.config.num_hidden_layers)
    return Source(folder, checkpoint, (whole,), None, None, None, checkpoint.warnings)


def parse_device_map(values: list[str], *, num_stages: int) -> Mapping[int, str]:
    """Read `--device-map` values: `STAGE=DEVICE` (stages count from 0), or one `DEVICE` for all stages.

    Returns:
        Zero-based stage index -> device name.

    Raises:
        UsageError: not of that form, or a stage that does not exist.
    """
    device_map: dict[int, str] = {}
    for value in [part for text in values for part in text.split(",")]:
        number, separator, device = value.partition("=")
        if not separator:
            device_map |= dict.fromkeys(range(num_stages), number)
            continue
        stage = parse_count(number)
        if stage is None or stage >= num_stages or not device:
            raise UsageError(
                f"'{printable(value, limit=60)}' maps no stage",
                where="--device-map",
                expected=f"STAGE=DEVICE with a stage from 0 to {num_stages - 1}, or one DEVICE for all",
                code="E-DEVICE",
            )
        device_map[stage] = device
    return device_map
