"""Compares a packed module with the weights it was made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from exporter.packing.packer import Squares
from exporter.packing.record import relative_error
from exporter.sources import Sources
from plans.checkpoint.header import SafetensorsHeader
from plans.checkpoint.names import UnitKey, unit_of
from plans.checkpoint.units import StoredTensor
from plans.dtypes import STORED_DTYPES
from plans.errors import IntegrityError
from plans.export.manifest import PackedUnit, PackingRecord
from plans.packed.scheme import PACKED, SCALE, SHAPE, Scheme
from plans.reading.digest import read_into

RUN_ELEMENTS = 1 << 18
_DIGITS_LOST = 1e-5
"""Of a recorded error of six digits, added up in another order."""


@dataclass(frozen=True, slots=True)
class Module:
    """A packed module in a stage's file, and the matrix it was made of."""

    name: str
    scheme: Scheme
    source: StoredTensor
    fd: int
    header: SafetensorsHeader
    path: Path

    def read(self, part: str, offset: int, size: int) -> memoryview:
        """Return some bytes of one of its three tensors."""
        buffer = memoryview(bytearray(size))
        begin = self.header.tensors[f"{self.name}.{part}"].begin
        read_into(self.fd, buffer, offset=begin + offset, where=self.path)
        return buffer

    @property
    def scale(self) -> str:
        """Stored dtype of the scales."""
        return self.header.tensors[f"{self.name}.{SCALE}"].dtype


@dataclass(frozen=True, slots=True)
class PackedComparison:
    """What is found about packed modules, one after another.

    Weights rounded to nearest are rounded again, and every byte compared. Calibrated ones are told by their distance to
    the model's weights: it must be the one the manifest records, of every unit to six digits.
    """

    record: PackingRecord
    sources: Sources
    take: Callable[[memoryview], None]
    squares: dict[UnitKey, dict[str, Squares]] = field(default_factory=dict)

    def compare(self, module: Module) -> None:
        """Compare one module; errors as `exporter.verify.verify`."""
        self._check_shape(module)
        entry, width = module.source.entry, STORED_DTYPES[module.source.entry.dtype].size_bytes
        error = squared = 0.0
        for start in range(0, entry.num_elements, RUN_ELEMENTS):
            count = min(RUN_ELEMENTS, entry.num_elements - start)
            original = memoryview(bytearray(count * width))
            self.sources.read(module.source.file, buffer=original, offset=entry.begin + start * width)
            run_error, run_squared = self._compare_run(module, original, start, count)
            error, squared = error + run_error, squared + run_squared
        key = unit_of(f"{module.name}.{PACKED}")
        assert key is not None
        self.squares.setdefault(key, {})[module.name] = error, squared

    def check_distances(self, where: Path) -> None:
        """Compare the distance of whole units with the recorded one.

        Raises:
            IntegrityError: the weights are not those the export was made from.
        """
        recorded: dict[UnitKey, PackedUnit] = {(unit.kind, unit.index): unit for unit in self.record.units}
        for key, squares in self.squares.items():
            found = relative_error(squares[name] for name in sorted(squares))
            unit = recorded.get(key)
            said = None if unit is None or unit.num_matrices != len(squares) else unit.relative_squared_error
            if said is None or not math.isclose(found, said, rel_tol=_DIGITS_LOST, abs_tol=1e-30):
                name = f"layer {key[1]}" if key[0] == "layer" else "the head"
                raise IntegrityError(
                    f"the packed weights of {name} are {found:.6g} (squared, relative) from the model's, the manifest "
                    f"says {said if said is not None else 'nothing'}",
                    where=where,
                    hint="the export was made from other weights",
                    code="E-MODEL",
                )

    def _compare_run(self, module: Module, original: memoryview, start: int, count: int) -> Squares:
        from plans.packed.rounding import round_to_nearest  # imports numpy
        from plans.packed.words import squares

        scheme, scale, stored = module.scheme, module.scale, module.source.entry.dtype
        assert scheme.group_size is not None
        words = module.read(PACKED, start * scheme.bits // 8, count * scheme.bits // 8)
        scales = module.read(SCALE, start // scheme.group_size * 2, count // scheme.group_size * 2)
        self.take(words)
        self.take(scales)
        if self.record.method != "nearest":
            return squares(original, words, scales, stored=stored, scheme=scheme, scale=scale)
        expected = round_to_nearest(original, stored=stored, scheme=scheme, scale=scale, name=module.name)
        for part, mine, theirs in ((PACKED, words, expected.words), (SCALE, scales, expected.scales)):
            if mine != theirs:
                raise IntegrityError(
                    f"{module.name}.{part} is not what the model's weights {start} to {start + count - 1} round to",
                    where=module.path,
                    hint="the export was made from other weights, or one of the two is damaged",
                    code="E-MODEL",
                )
        return expected.squared_error, expected.squared

    def _check_shape(self, module: Module) -> None:
        found = module.read(SHAPE, 0, 16)
        self.take(found)
        sides = tuple(int.from_bytes(found[at : at + 8], "little") for at in (0, 8))
        if sides != module.source.entry.shape:
            raise IntegrityError(
                f"{module.name}.{SHAPE} says {list(sides)}, in the model it is {list(module.source.entry.shape)}",
                where=module.path,
                code="E-MODEL",
            )
