"""The manifest of an export and the stage files derived from it."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from plans.cluster import Name
from plans.profile import Count, Sha256
from plans.reading.files import check_basename, sha256_hex
from plans.reading.strict import SchemaVersion, StrictModel, dump_json
from plans.stages import StageRange

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
MAX_MANIFEST_BYTES = 4 << 20
XXH3_128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class SourceFile(StrictModel):
    """A file of the checkpoint the export was made from."""

    name: str
    size: Count
    sha256: Sha256


class ExportedFile(StrictModel):
    """A file of the export; every file but the manifest and the stage files is listed."""

    path: str
    size: Count
    sha256: Sha256
    xxh3_128: XXH3_128
    """Fast checksum, compared when a bundle is loaded."""


class ManifestStage(StrictModel):
    """Which safetensors file belongs to which stage."""

    file: str
    device: Name
    start_layer: Count
    end_layer: Count
    has_embedding: bool
    has_head: bool

    @property
    def range(self) -> StageRange:
        """Which units the file holds."""
        return StageRange(self.device, self.start_layer, self.end_layer, self.has_embedding, self.has_head)


class PackedUnit(StrictModel):
    """How the matrices of one unit were packed."""

    kind: Literal["layer", "head"]
    index: Count
    """Layer number for layers, 0 for the head."""
    scheme: str
    """Such as `int4 g32`."""
    num_matrices: Count
    relative_squared_error: Annotated[float, Field(ge=0)]
    """Sum of (weight - what is stored)^2 over the sum of weight^2, of all its packed matrices; six digits."""


class CalibrationText(StrictModel):
    """The text that decided how weights were rounded."""

    size: Count
    """In bytes."""
    sha256: Sha256
    num_tokens: Count
    """So many of its tokens were used, from all over it."""


class PackingRecord(StrictModel):
    """How weights came to have the few bits that the plan chose for them."""

    method: Literal["nearest", "gptq"]
    """Rounded to nearest by scales of least squared error, or so that a text's activations change least."""
    units: Annotated[tuple[PackedUnit, ...], Field(min_length=1)]
    text: CalibrationText | None

    @model_validator(mode="after")
    def _text_belongs_to_gptq(self) -> "PackingRecord":
        if (self.method == "gptq") != (self.text is not None):
            raise ValueError("text belongs to gptq, and gptq needs one")
        return self


class Manifest(StrictModel):
    """`manifest.json`, written last: an export is complete exactly when it is there."""

    schema_version: SchemaVersion = 1
    export_id: Sha256
    plan_sha256: Sha256
    dtype: str
    stages: Annotated[tuple[ManifestStage, ...], Field(min_length=1)]
    source: tuple[SourceFile, ...]
    files: Annotated[tuple[ExportedFile, ...], Field(min_length=1)]
    packing: PackingRecord | None = None
    """Absent where weights are as they were stored."""

    @model_serializer(mode="wrap")
    def _without_null_packing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return written if self.packing is not None else {k: v for k, v in written.items() if k != "packing"}

    @model_validator(mode="after")
    def _names_are_safe_and_unique(self) -> "Manifest":
        names = [check_basename(file.path, where="files") for file in self.files]
        if len({name.casefold() for name in names}) != len(names):
            raise ValueError("two files have the same name")
        count = len(self.stages)
        reserved = {MANIFEST_NAME, *(stage_name(index, count) for index in range(count))} & set(names)
        if reserved:
            raise ValueError(f"{min(reserved)} cannot list itself")
        for index, stage in enumerate(self.stages):
            if stage.file != weights_name(index, count) or stage.file not in names:
                raise ValueError(f"stage {index} names {stage.file}; {weights_name(index, count)} must be listed")
        return self

    def derived_id(self) -> str:
        """Return the export id this manifest must have: the sha256 of itself without that key."""
        body = self.model_dump(mode="json", by_alias=True)
        del body["export_id"]
        return sha256_hex(dump_json(body).encode())

    def file(self, path: str) -> ExportedFile:
        """Return the entry of `path`; KeyError if there is none."""
        for file in self.files:
            if file.path == path:
                return file
        raise KeyError(path)

    def stage_json(self, index: int) -> str:
        """Return the exact text of the stage file of stage `index`."""
        stage = self.stages[index]
        weights = self.file(stage.file)
        return StageFile(
            export_id=self.export_id,
            plan_sha256=self.plan_sha256,
            stage=index,
            num_stages=len(self.stages),
            dtype=self.dtype,
            weights=weights,
            **asdict(stage.range),
        ).to_json()


class StageFile(StrictModel):
    """`stage-00001-of-0000N.json`: what one host needs to know about its stage."""

    schema_version: SchemaVersion = 1
    export_id: Sha256
    plan_sha256: Sha256
    stage: Count
    """Zero-based index in the chain."""
    num_stages: Count
    dtype: str
    device: Name
    start_layer: Count
    end_layer: Count
    has_embedding: bool
    has_head: bool
    weights: ExportedFile


def weights_name(index: int, num_stages: int) -> str:
    """Return the safetensors file name of stage `index` (zero-based)."""
    return f"model-{index + 1:05d}-of-{num_stages:05d}.safetensors"


def stage_name(index: int, num_stages: int) -> str:
    """Return the stage file name of stage `index` (zero-based)."""
    return f"stage-{index + 1:05d}-of-{num_stages:05d}.json"
