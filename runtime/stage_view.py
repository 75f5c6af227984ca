"""What a run reports about a stage, wherever it is computed."""

from dataclasses import dataclass

from plans.stages import StageSpec


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of a running session.

    Attributes:
        spec: its units.
        device: where it really is.
        decode_read_bytes: weight bytes it reads in a decode step.
    """

    spec: StageSpec
    device: str
    decode_read_bytes: int
