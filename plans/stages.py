"""Which units a stage holds: the one place that knows their keys, their profiles, their words and what a chain is."""

from collections.abc import Sequence
from dataclasses import dataclass

from plans.checkpoint.names import UnitKey
from plans.errors import InputError
from plans.profile import ModelProfile, UnitProfile


@dataclass(frozen=True, slots=True)
class StageRange:
    """Contiguous units on one device; layers are the half-open range [start_layer, end_layer).

    >>> stage = StageRange("cpu", 0, 4, has_embedding=True, has_head=False)
    >>> stage.num_layers, stage.words, stage.short_words
    (4, 'embedding, layers 0-3', 'emb + 0-3')
    """

    device: str
    start_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool

    @classmethod
    def whole(cls, num_layers: int, *, device: str = "cpu") -> "StageRange":
        """Return the one stage of a model that is not cut."""
        return cls(device, 0, num_layers, has_embedding=True, has_head=True)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.end_layer - self.start_layer

    @property
    def is_empty(self) -> bool:
        """Whether it holds no unit at all."""
        return not (self.num_layers or self.has_embedding or self.has_head)

    @property
    def has_both_ends(self) -> bool:
        """Whether embedding and head are here together, so that a tied table is needed once."""
        return self.has_embedding and self.has_head

    @property
    def keys(self) -> tuple[UnitKey, ...]:
        """The units in chain order."""
        layers = [("layer", index) for index in range(self.start_layer, self.end_layer)]
        return ((("embedding", 0),) * self.has_embedding) + (*layers, *((("head", 0),) * self.has_head))

    def owns(self, key: UnitKey) -> bool:
        """Return whether the stage holds the unit."""
        kind, index = key
        if kind == "layer":
            return self.start_layer <= index < self.end_layer
        return self.has_embedding if kind == "embedding" else self.has_head

    def units(self, profile: ModelProfile) -> tuple[UnitProfile, ...]:
        """Return what the units cost, in chain order."""
        layers = profile.layers[self.start_layer : self.end_layer]
        return (profile.embedding,) * self.has_embedding + layers + (profile.head,) * self.has_head

    @property
    def words(self) -> str:
        """What the stage holds, such as `embedding, layers 0-3`; numbers are inclusive, as always in words."""
        return ", ".join(self._parts("embedding", "layer " if self.num_layers == 1 else "layers "))

    @property
    def short_words(self) -> str:
        """The same where room is short, such as `emb + 0-3`."""
        return " + ".join(self._parts("emb", ""))

    def _parts(self, embedding: str, layers: str) -> list[str]:
        first, last = self.start_layer, self.end_layer - 1
        numbers = [f"{layers}{first}-{last}" if last > first else f"{layers}{first}"] * (last >= first)
        return [embedding] * self.has_embedding + numbers + ["head"] * self.has_head


def stage_names(stages: Sequence[StageRange]) -> list[str]:
    """Return what each stage is called where several are spoken of, such as `stage 1 (layers 4-5)`."""
    return [f"stage {index} ({stage.words})" for index, stage in enumerate(stages)]


@dataclass(frozen=True, slots=True)
class ChainFault:
    """Where stages stop being a chain: the stage, counted from 0, its field ("" for all of it), and what is wrong."""

    index: int
    key: str
    what: str
    expected: str = ""

    def __str__(self) -> str:
        return f"stage {self.index}: {self.what}"


def chain_fault(stages: Sequence[StageRange], *, num_layers: int) -> ChainFault | None:
    """Return what is wrong first; None where every unit is there once, in order, and no stage is empty."""
    last, position = len(stages) - 1, 0
    for index, stage in enumerate(stages):
        start, end = stage.start_layer, stage.end_layer
        if end < start:
            return ChainFault(index, "end_layer", f"end_layer {end} comes before start_layer {start}")
        if start != position:
            kind = "overlap the stage before" if start < position else "leave a gap"
            return ChainFault(index, "start_layer", f"layers from {start} {kind}", f"{position}")
        if stage.has_embedding != (index == 0):
            return ChainFault(index, "has_embedding", "the embedding belongs to the first stage alone")
        if stage.has_head != (index == last):
            return ChainFault(index, "has_head", "the head belongs to the last stage alone")
        if stage.is_empty:
            return ChainFault(index, "", "the stage is empty")
        position = end
    if position != num_layers:
        return ChainFault(max(last, 0), "end_layer", f"the stages hold {position} layers", f"{num_layers} layers")
    return None


def check_stages(stages: Sequence[StageRange], *, num_layers: int) -> None:
    """Require that the stages cover the model once, in chain order.

    Raises:
        InputError: naming the stage that breaks the chain.
    """
    fault = chain_fault(stages, num_layers=num_layers)
    if fault is not None:
        raise InputError(str(fault), expected=fault.expected, hint="solve or export again", code="E-STAGES")
