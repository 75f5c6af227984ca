"""What several commands check before they ask the planner."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import UsageError, printable

if TYPE_CHECKING:
    from planner.problem.goal import SolverName
    from plans.plan import Demands

AUTO = "auto"


def refuse_inside(output: Path | None, folder: Path | None) -> None:
    """Refuse to write a result into the checkpoint it was made from."""
    if output is not None and folder is not None and output.absolute().parent.resolve() == folder.resolve():
        raise UsageError(f"--output {output} lies inside the checkpoint", hint="choose another folder")


def check_time_limit(seconds: float) -> None:
    """Refuse a time limit that is no time."""
    check_number("--time-limit", seconds, "above 0", is_good=0 < seconds < math.inf)


def chunk_tokens(text: str | None) -> int | None:
    """Return the tokens of --prefill-chunk; None where the planner chooses, or where all are taken at once."""
    if text is None or text == AUTO:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= 2**31):
        raise UsageError(f"--prefill-chunk is {printable(text, limit=40)}", expected=f"1 to {2**31}, or auto")
    return int(text)


def check_number(option: str, value: float, expected: str, *, is_good: bool) -> None:
    """Refuse a value that is out of range."""
    if not is_good:
        raise UsageError(f"{option} is {value}", expected=expected)


def demands_of(
    pins: list[str] | None,
    bans: list[str] | None,
    *,
    layers: str | None = None,
    keep_order: bool = False,
    use_all: bool = False,
) -> "Demands":
    """Return what the options demand."""
    from plans.plan import Demands

    return Demands(
        pins=tuple(pins or ()), bans=tuple(bans or ()), layers=layers, keep_order=keep_order, use_all=use_all
    )


def solvers_of(name: Literal["auto", "highs", "cbc"]) -> "tuple[SolverName, ...]":
    """Return the solvers that --solver names."""
    return ("highs", "cbc") if name == "auto" else (name,)
