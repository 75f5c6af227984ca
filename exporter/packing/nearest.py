"""Rounds one matrix while it streams: runs of rows on several threads, handed on in their order."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from exporter.layout import Piece
from exporter.packing.ordered import in_order
from exporter.sources import Sources
from plans.dtypes import STORED_DTYPES
from plans.native.building import Unavailable

if TYPE_CHECKING:
    from plans.packed.rounding import Rounded

RUN_ELEMENTS = 1 << 19
"""Weights per task; whole groups, and few enough that all threads' runs take little memory."""
MAX_THREADS = 8
"""Beyond, hashing is what takes longest."""


def slow_words() -> str | None:
    """Return why rounding takes several times as long here as it could; None where it does not."""
    from plans.packed.kernel import find_kernel  # imports numpy

    kernel = find_kernel()
    if not isinstance(kernel, Unavailable):
        return None
    return f"weights are rounded several times slower without compiled code: {kernel.reason}"


@dataclass(frozen=True, slots=True)
class NearestRounder:
    """Rounds to nearest, by the scales of least squared error."""

    sources: Sources
    pool: ThreadPoolExecutor
    num_threads: int
    scale: str
    """Stored dtype of the scales."""

    @property
    def kept_bytes(self) -> int:
        """Nothing is put aside."""
        return 0

    def runs(self, piece: Piece) -> Iterator["Rounded"]:
        """Yield the packed runs of a matrix, from its first row to its last.

        Raises:
            InputError: a weight cannot be rounded.
            IntegrityError, MachineError: as `Sources.read`.
        """
        return in_order(self.pool, self._tasks(piece), ahead=2 * self.num_threads)

    def _tasks(self, piece: Piece) -> Iterator[Callable[[], "Rounded"]]:
        from plans.packed.rounding import round_to_nearest  # imports numpy

        assert piece.scheme is not None
        entry, width = piece.source.entry, STORED_DTYPES[piece.source.entry.dtype].size_bytes
        how = partial(
            round_to_nearest, stored=entry.dtype, scheme=piece.scheme, scale=self.scale, name=piece.source.name
        )
        for start in range(0, entry.num_elements, RUN_ELEMENTS):
            data = memoryview(bytearray(min(RUN_ELEMENTS, entry.num_elements - start) * width))
            self.sources.read(piece.source.file, buffer=data, offset=entry.begin + start * width)
            yield partial(how, data)
