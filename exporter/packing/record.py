"""What the manifest says about packed weights: how they were rounded, and how far they are from what they were."""

from collections.abc import Iterator, Mapping

from exporter.layout import Layout
from exporter.packing.packer import Squares
from plans.checkpoint.names import unit_of
from plans.export.manifest import CalibrationText, PackedUnit, PackingRecord

DIGITS = 6
"""Of a recorded error: so many are the same whatever adds it up."""


def packing_record(layout: Layout, squares: Mapping[str, Squares], *, text: CalibrationText | None) -> PackingRecord:
    """Return the record of an export.

    Args:
        layout: which modules are packed, and how.
        squares: of each of them.
        text: what it was calibrated on; None where it was rounded to nearest.
    """
    units = tuple(_units(layout, squares))
    return PackingRecord(method="nearest" if text is None else "gptq", units=units, text=text)


def _units(layout: Layout, squares: Mapping[str, Squares]) -> Iterator[PackedUnit]:
    modules: dict[tuple[str, int], list[str]] = {}
    for module in layout.schemes:
        key = unit_of(f"{module}.weight")
        assert key is not None
        modules.setdefault(key, []).append(module)
    for (kind, index), names in modules.items():
        yield PackedUnit(
            kind="layer" if kind == "layer" else "head",
            index=index,
            scheme=layout.schemes[names[0]].words,
            num_matrices=len(names),
            relative_squared_error=relative_error(squares[name] for name in sorted(names)),
        )


def relative_error(squares: Iterator[Squares]) -> float:
    """Return the squared error of some matrices together, in terms of their squared weights."""
    error = squared = 0.0
    for one_error, one_squared in squares:
        error, squared = error + one_error, squared + one_squared
    return float(f"{error / squared if squared else 0.0:.{DIGITS}g}")
