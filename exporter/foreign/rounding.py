"""How far weights move where they are written in another form: said with numbers, never silently."""

import math
from dataclasses import dataclass, field

import numpy as np

from exporter.foreign.numbers import Floats


@dataclass(slots=True)
class RoundingErrors:
    """Sums over what was written, by tensor: squares of the differences, and of the weights."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, *, moved: float, size: float) -> None:
        """Count rows of a tensor: the squares of their differences, and their own."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + moved, before[1] + size

    def compare(self, name: str, before: Floats, after: Floats) -> None:
        """Count rows of a tensor as they were and as they are."""
        difference, whole = (after - before).ravel(), before.ravel()
        self.add(name, moved=float(np.vdot(difference, difference)), size=float(np.vdot(whole, whole)))

    @property
    def words(self) -> str:
        """How far weights moved, together and at most, in one sentence; empty where none did."""
        moved, size = (sum(part) for part in zip(*self.sums.values(), strict=True)) if self.sums else (0.0, 0.0)
        if not moved:
            return ""
        relative = {name: _relative(*sums) for name, sums in self.sums.items()}
        worst = max(relative, key=lambda name: relative[name])
        together = f"{len(relative)} tensors were rounded by {_relative(moved, size):.2g} of their size"
        return f"{together} (root of squares), {worst} the most, by {relative[worst]:.2g}"


def _relative(moved: float, size: float) -> float:
    return math.sqrt(moved / size) if size else 0.0
