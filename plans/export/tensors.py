"""What a stage's safetensors file must hold: its number, its plan, and exactly the tensors of its units."""

from collections.abc import Mapping
from pathlib import Path

from plans.checkpoint.header import SafetensorsHeader
from plans.checkpoint.names import UnitKey, head_name, local_name, unit_of
from plans.checkpoint.units import hash_shapes
from plans.dtypes import DTYPES
from plans.errors import IntegrityError, printable
from plans.export.manifest import Manifest
from plans.packed.choice import WeightChoice
from plans.packed.tensors import Row, original_rows
from plans.plan import Plan

METADATA_STAGE = "llamaplan_stage"
METADATA_NUM_STAGES = "llamaplan_num_stages"
METADATA_PLAN = "llamaplan_plan_sha256"

_FLOATS = frozenset(dtype.stored for dtype in DTYPES.values())


def metadata_of(stage: int, *, num_stages: int, plan_sha256: str) -> dict[str, str]:
    """Return the `__metadata__` of a stage's safetensors file; `format` is what transformers asks for."""
    return {
        "format": "pt",
        METADATA_STAGE: str(stage),
        METADATA_NUM_STAGES: str(num_stages),
        METADATA_PLAN: plan_sha256,
    }


def check_metadata(path: Path, header: SafetensorsHeader, *, index: int, manifest: Manifest) -> None:
    """Compare the stage number and the plan's hash inside a stage file with the place where it lies.

    Raises:
        IntegrityError: stages were swapped, renamed, or mixed from two plans.
    """
    expected = metadata_of(index, num_stages=len(manifest.stages), plan_sha256=manifest.plan_sha256)
    for key, value in expected.items():
        found = header.metadata.get(key, "nothing")
        if found != value:
            raise IntegrityError(
                f"its metadata says {key} {printable(found, limit=80)}, this place needs {value}",
                where=path,
                hint="the stages were swapped, renamed or mixed; copy them again",
                code="E-STAGE",
            )


def check_tensors(path: Path, header: SafetensorsHeader, *, index: int, manifest: Manifest, plan: Plan) -> None:
    """Check that every tensor belongs to a unit of the stage and every unit has the tensors the plan was made for.

    Raises:
        IntegrityError: a foreign, missing or differently shaped tensor, or one of another dtype.
    """
    stage = manifest.stages[index].range
    rows: Mapping[str, Row] = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    rows = rows if plan.weights is None else _before_packing(path, rows, manifest, plan.weights)
    owned: dict[UnitKey, dict[str, tuple[str, tuple[int, ...]]]] = {key: {} for key in stage.keys}
    for name, (dtype, shape) in rows.items():
        key = unit_of(name)
        if key not in owned:
            raise IntegrityError(f"holds {printable(name)}, which is not of stage {index}", where=path, code="E-STAGE")
        owned[key][local_name(name)] = (dtype, shape)
        if manifest.dtype in DTYPES and dtype in _FLOATS - {DTYPES[manifest.dtype].stored}:
            raise IntegrityError(f"{name} is {dtype}, the manifest says {manifest.dtype}", where=path, code="E-STAGE")
    if stage.has_both_ends and plan.profile.tied:
        owned["head", 0] = {head_name(name): row for name, row in owned["embedding", 0].items()} | owned["head", 0]
    _check_shapes(path, manifest, plan, owned)


def _before_packing(path: Path, rows: Mapping[str, Row], manifest: Manifest, choice: WeightChoice) -> Mapping[str, Row]:
    """Return the tensors of which the packed ones were made; their dtype follows from the manifest's."""
    scale = DTYPES[manifest.dtype].stored if manifest.dtype in DTYPES else DTYPES["bf16"].stored
    try:
        return original_rows(rows, choice, scale=scale)
    except KeyError as error:
        raise IntegrityError(
            f"{printable(error.args[0])} is not what {choice.kind} makes of that module",
            where=path,
            hint="the file belongs to another export; copy it again",
            code="E-STAGE",
        ) from None


def _check_shapes(
    path: Path,
    manifest: Manifest,
    plan: Plan,
    owned: Mapping[UnitKey, Mapping[str, tuple[str, tuple[int, ...]]]],
) -> None:
    model = plan.profile.model
    is_as_stored = model.packing is not None and plan.weights is None
    stored = model.stored_dtype
    recorded: dict[UnitKey, str] = {(unit.kind, unit.index): unit.shapes_sha256 for unit in plan.profile.units}
    if not is_as_stored and manifest.dtype != stored and not {manifest.dtype, stored} <= set(DTYPES):
        return  # converted from mixed dtypes: the plan's hashes are of dtypes that are no longer there
    for key, tensors in owned.items():
        original = {
            name: (DTYPES[stored].stored if stored in DTYPES and dtype in _FLOATS else dtype, shape)
            for name, (dtype, shape) in tensors.items()
        }
        if hash_shapes(original) != recorded[key]:
            what = key[0] if key[0] != "layer" else f"layer {key[1]}"
            raise IntegrityError(
                f"the tensors of the {what} are not those the plan was made for",
                where=path,
                hint="the file belongs to another model; copy it again",
                code="E-STAGE",
            )
