"""The weights a plan was made for: how many bits each layer gets when its model is exported."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from plans.packed.scheme import Scheme, is_linear
from plans.reading.strict import StrictModel

SIDE = 32
"""Both sides of a packed matrix are multiples of this; the others stay as they are."""
AS_STORED = 16
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\..+")


def _one_of(*allowed: int) -> AfterValidator:
    def check(value: int) -> int:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}")
        return value

    return AfterValidator(check)


LayerBits = Annotated[int, _one_of(4, 8, AS_STORED), Field(json_schema_extra={"enum": [4, 8, AS_STORED]})]
HeadBits = Annotated[int, _one_of(8, AS_STORED), Field(json_schema_extra={"enum": [8, AS_STORED]})]
Error = Annotated[float, Field(ge=0, le=1e6)]
GroupSize = Annotated[int, _one_of(SIDE), Field(json_schema_extra={"enum": [SIDE]})]


class WeightError(StrictModel):
    """What a choice is expected to cost, rounded to nearest: mean KL per token to the model as it is."""

    expected: Error
    budget: Error | None = None
    """What was allowed; null where the choice was made by hand."""
    sensitivity_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file with what each layer costs."""


class WeightChoice(StrictModel):
    """How many bits the linear layers of every decoder layer, and the head, are stored in; 16 leaves them alone.

    Embedding, norms and biases stay as they are always, and so does a head that shares the embedding's table.
    """

    kind: Literal["int8", "int4", "mixed"]
    layer_bits: Annotated[tuple[LayerBits, ...], Field(min_length=1)]
    """One entry per decoder layer: all matrices of a layer have the same."""
    head_bits: HeadBits = AS_STORED
    group_size: GroupSize = SIDE
    error: WeightError | None = None
    """Absent where nobody measured what fewer bits cost."""

    @model_serializer(mode="wrap")
    def _without_unknown_error(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return written if self.error is not None else {k: v for k, v in written.items() if k != "error"}

    @model_validator(mode="after")
    def _kind_says_the_bits(self) -> "WeightChoice":
        other = {"int8": 4, "int4": 8}.get(self.kind)
        if other in self.layer_bits:
            raise ValueError(f"{self.kind} has no layers of {other} bits")
        return self

    @property
    def words(self) -> str:
        """Such as `int4`, or `int4 (5) and int8 (2)` where layers differ."""
        counts = {bits: self.layer_bits.count(bits) for bits in (4, 8, AS_STORED)}
        names = {4: "int4", 8: "int8", AS_STORED: "16 bits"}
        held = [f"{names[bits]} ({count})" for bits, count in counts.items() if count]
        return self.kind if len(held) == 1 and self.kind != "mixed" else " and ".join(held)

    def scheme_of(self, module: str, *, out: int, in_: int) -> Scheme | None:
        """Return how a module's matrix of `out` rows and `in_` columns is stored; None where it is left alone.

        >>> choice = WeightChoice(kind="int4", layer_bits=(4, 4))
        >>> choice.scheme_of("model.layers.1.mlp.up_proj", out=64, in_=128).words
        'int4 g32'
        >>> choice.scheme_of("model.layers.1.mlp.up_proj", out=64, in_=100) is None
        True
        """
        bits = self.bits_of(module)
        if not is_linear(module) or out % SIDE or in_ % SIDE:
            return None
        return Scheme(4, self.group_size) if bits == 4 else Scheme(8, self.group_size) if bits == 8 else None

    def bits_of(self, module: str) -> int:
        """Return how many bits were chosen for a module's layer or head, whether its matrix can be packed or not."""
        layer = _LAYER.fullmatch(module)
        if layer is None:
            return self.head_bits if module == "lm_head" else AS_STORED
        index = int(layer[1])
        return self.layer_bits[index] if index < len(self.layer_bits) else AS_STORED
