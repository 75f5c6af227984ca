"""The model profile: what every unit of a model costs, whatever device it will run on."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from plans.config.config import SUPPORTED_FAMILIES
from plans.config.windows import ONE_MASK
from plans.dtypes import DtypeName
from plans.reading.strict import SchemaVersion, StrictModel

Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UnitKind = Literal["embedding", "layer", "head"]
PackedName = Literal["int4", "int8"]
"""Weights of so many bits, packed as `plans.packed.scheme` says."""


class ShardIdentity(StrictModel):
    """One safetensors or GGUF file the profile was read from."""

    name: str
    size_bytes: Count
    header_sha256: Sha256


class ModelIdentity(StrictModel):
    """Which model it is, and the `config.json` fields that costs depend on."""

    name: str
    model_type: str
    architecture: str
    config_sha256: Sha256
    source: Literal["headers", "config", "gguf"]
    """Where sizes come from: safetensors headers, the formula over the configuration alone, or a GGUF header."""
    shards: tuple[ShardIdentity, ...]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    vocab_size: Count
    max_position_embeddings: Count
    scaled_context_tokens: Count | None = None
    """The longest context where rope scaling reaches beyond max_position_embeddings; absent elsewhere."""
    num_experts: Count
    num_experts_per_tok: Count
    stored_dtype: str
    """The dtype the weights are stored in ("mixed" if several)."""
    quantization: str | None
    packing: str | None = None
    """How its linear layers are packed, such as `int4 g32`, where llamarun reads that; absent elsewhere."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {k: v for k, v in written.items() if v is not None or k not in ("scaled_context_tokens", "packing")}

    @property
    def has_plain_weights(self) -> bool:
        """Whether llamarun reads the weights: they are not quantised, or packed in a way it knows."""
        return self.quantization is None or self.packing is not None

    @property
    def storage_words(self) -> str | None:
        """How quantised weights are stored, for people; None where they are not."""
        return self.quantization if self.packing is None else f"{self.quantization} {self.packing}"

    @property
    def longest_context_tokens(self) -> int:
        """The longest context the model allows."""
        return self.scaled_context_tokens or self.max_position_embeddings


class UnitProfile(StrictModel):
    """Costs of one unit: the embedding, one decoder layer, or final norm + lm_head."""

    kind: UnitKind
    index: Count
    """Layer number for layers, 0 for the others."""
    parameters: Count
    stored_weight_bytes: Count
    weight_bytes: Count
    """Bytes at the chosen dtype. A tied head counts its table here too; a stage that holds both ends counts it once."""
    decode_read_bytes: Count
    """Weight bytes read per decode step (for the embedding: per sequence, one row)."""
    kv_bytes_per_token: Count
    kv_window_tokens: Count | None
    """How many past tokens the layer keeps; null for all of them."""
    state_bytes_per_sequence: Count = 0
    """What a recurrent layer keeps of a sequence of any length; absent where nothing."""
    flops_per_token: Count
    attention_flops_per_token_per_context: Count
    """FLOPs per token for each token of context it attends to."""
    shapes_sha256: Sha256
    """Hash over the unit's sorted (name, dtype, shape) rows, as they are stored in the checkpoint."""
    weights: PackedName | None = None
    """How its matrices are packed, or will be; absent where they have the chosen dtype."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {k: v for k, v in written.items() if v or k not in ("weights", "state_bytes_per_sequence")}


class Difference(StrictModel):
    """Something the headers hold that the formula over the configuration does not expect, or the reverse."""

    name: str
    size_bytes: Count
    note: str


class Origin(StrictModel):
    """Where a number comes from that does not follow from the usual keys."""

    number: str
    """Field of the profile."""
    key: str
    """Key of `config.json`, or part of tensor names."""
    how: str


class ModelProfile(StrictModel):
    """What `llamaplan analyze` writes."""

    schema_version: SchemaVersion = 1
    model: ModelIdentity
    dtype: DtypeName
    kv_cache_dtype: DtypeName
    tied: bool
    units: tuple[UnitProfile, ...]
    total_parameters: Count
    total_weight_bytes: Count
    """Bytes of all weights at the chosen dtype, a tied table once."""
    differences: tuple[Difference, ...]
    origins: tuple[Origin, ...] = ()
    """For families outside the allow-list; absent for the others, whose numbers follow from the usual keys."""

    @model_serializer(mode="wrap")
    def _without_empty_origins(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return written if self.origins else {k: v for k, v in written.items() if k != "origins"}

    @model_validator(mode="after")
    def _is_a_chain(self) -> "ModelProfile":
        layers = self.model.num_hidden_layers
        found = [(unit.kind, unit.index) for unit in self.units]
        own = [("embedding", 0), *(("layer", i) for i in range(len(found) - 2)), ("head", 0)]
        if found != own or len(found) != layers + 2:
            raise ValueError(f"units must be the embedding, layers 0 to {layers - 1} and the head, in this order")
        return self

    @property
    def not_run(self) -> str | None:
        """What keeps llamarun from running it, as far as sizes tell; None where nothing does."""
        model, windows = self.model, {layer.kv_window_tokens for layer in self.layers}
        if not model.has_plain_weights:
            return f"{model.quantization} weights"
        if model.model_type not in SUPPORTED_FAMILIES:
            return f"model_type {model.model_type}"
        if self.origins:
            return f"{model.model_type} with layers without experts"
        if len(windows) > 1 and model.model_type in ONE_MASK:
            return f"{model.model_type} with layers that forget among others"
        return "a window of 1 token" if 1 in windows else None

    @property
    def layers(self) -> tuple[UnitProfile, ...]:
        """The decoder layers."""
        return self.units[1:-1]

    @property
    def embedding(self) -> UnitProfile:
        """The embedding unit."""
        return self.units[0]

    @property
    def head(self) -> UnitProfile:
        """The final norm + lm_head unit."""
        return self.units[-1]
