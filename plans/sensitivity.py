"""What fewer bits cost a model, layer by layer: measured once, and used by every plan that mixes widths.

Errors are the mean KL divergence per token from the model as it is, of the whole model with only that part rounded to
nearest in groups of 32. They add up over layers (30 mixes of two models: correlation 0.998).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from plans.dtypes import DtypeName
from plans.errors import IntegrityError
from plans.packed.choice import AS_STORED, Error, WeightChoice
from plans.profile import Count, ModelProfile, Sha256, ShardIdentity
from plans.reading.files import sha256_hex
from plans.reading.strict import SchemaVersion, StrictModel

MAX_BYTES = 16 << 20


class SensitivitySubject(StrictModel):
    """What was measured, and on which text."""

    name: str
    config_sha256: Sha256
    shards: tuple[ShardIdentity, ...]
    """The files of the weights, by the hashes of their headers."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=100_000)]
    dtype: DtypeName
    """What everything that is not packed, and every scale, is stored in."""
    group_size: Literal[32] = 32
    text_sha256: Sha256
    num_tokens: Count
    window_tokens: Count
    """The text was read in windows of so many tokens, each for itself."""


class PartialSensitivity(StrictModel):
    """As far as a measurement has come."""

    schema_version: SchemaVersion = 1
    subject: SensitivitySubject
    int8: Error | None = None
    head_int8: Error | None = None
    int4: tuple[Error, ...] = ()


class Sensitivity(StrictModel):
    """What `llamaplan sensitivity` writes."""

    schema_version: SchemaVersion = 1
    subject: SensitivitySubject
    int8: Error
    """Of all layers in 8 bits together."""
    head_int8: Error | None
    """Of the head alone in 8 bits; null where it shares the embedding's table."""
    int4: tuple[Error, ...]
    """Of each layer alone in 4 bits."""

    @model_validator(mode="after")
    def _has_every_layer(self) -> "Sensitivity":
        if len(self.int4) != self.subject.num_hidden_layers:
            raise ValueError(f"int4 holds {len(self.int4)} layers, the model has {self.subject.num_hidden_layers}")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the file's canonical bytes; what a plan binds to."""
        return sha256_hex(self.to_json().encode())

    @property
    def layer_int8(self) -> tuple[float, ...]:
        """The error of each layer in 8 bits: the measured sum, shared out as the errors in 4 bits are.

        Both grow with the square of the step between two numbers, which is so much smaller in 8 bits.
        """
        total = sum(self.int4)
        return tuple(self.int8 * (error / total if total else 1 / len(self.int4)) for error in self.int4)

    def expected(self, choice: WeightChoice) -> float:
        """Return the error that a choice is expected to have."""
        by_bits = {4: self.int4, 8: self.layer_int8, AS_STORED: (0.0,) * len(self.int4)}
        head = self.head_int8 if choice.head_bits != AS_STORED else None
        return sum(by_bits[bits][index] for index, bits in enumerate(choice.layer_bits)) + (head or 0.0)


def read_sensitivity(path: Path, profile: ModelProfile) -> Sensitivity:
    """Read a file and compare it with the model that is planned.

    Raises:
        InputError: missing, or not such a file.
        IntegrityError: (E-SENSITIVITY) it was measured on another model.
    """
    found = Sensitivity.read(path, max_bytes=MAX_BYTES)
    subject, model = found.subject, profile.model
    ours = tuple(shard.header_sha256 for shard in model.shards)
    theirs = tuple(shard.header_sha256 for shard in subject.shards)
    if subject.config_sha256 != model.config_sha256 or (ours and ours != theirs):
        here, there = (subject.config_sha256, model.config_sha256)
        if here == there:
            here, there = (" ".join(theirs) or "none", " ".join(ours))
        raise IntegrityError(
            f"it was measured on {subject.name} ({here}), the model to plan is {model.name} ({there})",
            where=path,
            hint="measure this model: llamaplan sensitivity MODEL --text FILE",
            code="E-SENSITIVITY",
        )
    return found
