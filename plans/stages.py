"""Which units a stage holds: the part of a plan's stage that the runtime needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from plans.checkpoint.folder import UnitKey
from plans.errors import InputError


class StageSpec(Protocol):
    """What a stage is built from; `plans.plan.Stage` and `StageRange` both satisfy it."""

    @property
    def device(self) -> str: ...
    @property
    def start_layer(self) -> int: ...
    @property
    def end_layer(self) -> int: ...
    @property
    def has_embedding(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class StageRange:
    """Contiguous units on one device; layers are the half-open range [start_layer, end_layer).

    >>> StageRange("cpu", 0, 4, has_embedding=True, has_head=False).num_layers
    4
    """

    device: str
    start_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.end_layer - self.start_layer


def owns_unit(spec: StageSpec, key: UnitKey) -> bool:
    """Return whether the stage holds the unit."""
    kind, index = key
    if kind == "layer":
        return spec.start_layer <= index < spec.end_layer
    return spec.has_embedding if kind == "embedding" else spec.has_head


def describe_stage(spec: StageSpec) -> str:
    """Return what the stage holds in words, such as `embedding, layers 0-3`."""
    parts = ["embedding"] if spec.has_embedding else []
    last = spec.end_layer - 1
    if last >= spec.start_layer:
        parts.append(f"layer {last}" if last == spec.start_layer else f"layers {spec.start_layer}-{last}")
    return ", ".join([*parts, "head"] if spec.has_head else parts)


def stage_names(specs: Sequence[StageSpec]) -> list[str]:
    """Return what each stage is called where several are spoken of, such as `stage 1 (layers 4-5)`."""
    return [f"stage {number} ({describe_stage(spec)})" for number, spec in enumerate(specs)]


def check_stages(specs: Sequence[StageSpec], *, num_hidden_layers: int) -> None:
    """Require that the stages cover the model once, in chain order.

    Raises:
        InputError: naming the stage that breaks the chain.
    """
    if not specs:
        raise _broken("there are no stages", expected="at least one")
    next_layer = 0
    for number, spec in enumerate(specs, start=1):
        if spec.has_embedding != (number == 1) or spec.has_head != (number == len(specs)):
            raise _broken(
                f"stage {number} holds {describe_stage(spec) or 'nothing'}",
                expected="the embedding in the first stage and the head in the last, and nowhere else",
            )
        if spec.start_layer != next_layer or spec.end_layer < spec.start_layer:
            raise _broken(
                f"stage {number} holds layers [{spec.start_layer}, {spec.end_layer})",
                expected=f"a range that starts at layer {next_layer}",
            )
        if not describe_stage(spec):
            raise _broken(f"stage {number} holds nothing", expected="at least one unit per stage")
        next_layer = spec.end_layer
    if next_layer != num_hidden_layers:
        raise _broken(f"the stages hold {next_layer} layers", expected=f"{num_hidden_layers}, as the model has")


def _broken(what: str, *, expected: str) -> InputError:
    return InputError(what, expected=expected, hint="solve or export again", code="E-STAGES")
