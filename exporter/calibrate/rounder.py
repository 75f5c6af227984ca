"""Hands on matrices that were calibrated before; the head, which is not, is rounded to nearest."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.layout import Piece
from exporter.packing.nearest import RUN_ELEMENTS, NearestRounder
from exporter.packing.packer import Squares
from exporter.packing.scratch import Scratch
from plans.packed.scheme import PACKED, SCALE

if TYPE_CHECKING:
    from plans.packed.rounding import Rounded


@dataclass(slots=True)
class CalibratedRounder:
    """Calibrates everything when the first matrix is asked for."""

    calibrate: Callable[[Scratch], Mapping[str, Squares]]
    """Puts both tensors of every calibrated module aside, by their names, and returns the modules' squares."""
    kept: Scratch
    kept_bytes: int
    """What will be put aside."""
    nearest: NearestRounder
    squares: Mapping[str, Squares] | None = None

    def runs(self, piece: Piece) -> "Iterator[Rounded]":
        """Yield the packed runs of a matrix, from its first row to its last; errors as `calibrate_layers`."""
        if self.squares is None:
            self.squares = self.calibrate(self.kept)
        own = self.squares.get(piece.module)
        return self.nearest.runs(piece) if own is None else self._kept_runs(piece, own)

    def _kept_runs(self, piece: Piece, own: Squares) -> "Iterator[Rounded]":
        from plans.packed.rounding import Rounded  # imports numpy

        (error, squared), total = own, piece.source.entry.num_elements
        for start in range(0, total, RUN_ELEMENTS):
            end = min(start + RUN_ELEMENTS, total)
            words, scales = (self._part(f"{piece.module}.{part}", start, end, total) for part in (PACKED, SCALE))
            yield Rounded(words, scales, error, squared)
            error = squared = 0.0  # counted once

    def _part(self, name: str, start: int, end: int, total: int) -> memoryview:
        """Return what belongs to the weights `start` to `end` of so many."""
        size = self.kept.size(name)
        buffer = memoryview(bytearray((end - start) * size // total))
        self.kept.read(name, buffer=buffer, offset=start * size // total)
        return buffer
