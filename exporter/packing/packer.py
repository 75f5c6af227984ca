"""Writes the three tensors of a packed module, whose scales are known long before their place in the file comes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from exporter.layout import Piece
from exporter.packing.scratch import Scratch
from plans.packed.scheme import PACKED, SCALE, SHAPE
from plans.reading.digest import BUFFER_BYTES

if TYPE_CHECKING:
    from plans.packed.rounding import Rounded

Put = Callable[[bytes | memoryview], None]
"""Takes the next bytes of a file."""
Squares = tuple[float, float]
"""Sums of (weight - what is stored)^2 and of weight^2 over a matrix."""


class Rounder(Protocol):
    """Turns a matrix into packed runs."""

    @property
    def kept_bytes(self) -> int:
        """Bytes it puts aside beside the export."""

    def runs(self, piece: Piece) -> Iterator["Rounded"]: ...


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs the modules of one stage after another."""

    rounder: Rounder
    scales: Scratch
    """Of the modules of the current stage."""
    squares: dict[str, Squares] = field(default_factory=dict)
    """By module, of all stages so far."""

    def begin_stage(self) -> None:
        """Forget the scales of the stage before."""
        self.scales.clear()

    def stream(self, piece: Piece, put: Put) -> None:
        """Put the bytes of one of a module's three tensors; its packed numbers come first.

        Raises:
            InputError, IntegrityError, MachineError: as the rounder's `runs`.
        """
        write = {PACKED: self._put_words, SCALE: self._put_scales, SHAPE: _put_shape}[piece.part]
        write(piece, put)

    def _put_words(self, piece: Piece, put: Put) -> None:
        error = squared = 0.0
        for run in self.rounder.runs(piece):
            put(run.words)
            self.scales.add(piece.module, run.scales)
            error, squared = error + run.squared_error, squared + run.squared
        self.squares[piece.module] = error, squared

    def _put_scales(self, piece: Piece, put: Put) -> None:
        size = self.scales.size(piece.module)
        for offset in range(0, size, BUFFER_BYTES):
            buffer = memoryview(bytearray(min(BUFFER_BYTES, size - offset)))
            self.scales.read(piece.module, buffer=buffer, offset=offset)
            put(buffer)


def _put_shape(piece: Piece, put: Put) -> None:
    put(b"".join(side.to_bytes(8, "little") for side in piece.source.entry.shape))
