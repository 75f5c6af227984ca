"""What fewer bits cost a model, as a person sees it in a terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.ladder import least_sensitive
from plans.commands.console import table
from plans.sensitivity import Sensitivity

if TYPE_CHECKING:
    from rich.table import Table

BAR_CELLS = 24


def layer_table(found: Sensitivity) -> "Table":
    """Return one row per layer, the most sensitive last."""
    rows, most = table("layer", "", numbers=("error in int4",)), max(found.int4)
    for index in least_sensitive(found):
        cells = round(BAR_CELLS * found.int4[index] / most) if most else 0
        rows.add_row(str(index), "█" * cells, f"{found.int4[index]:.4g}")
    return rows


def summary_lines(found: Sensitivity) -> Iterator[str]:
    """Yield what uniform widths cost, and on what it was measured."""
    head = "" if found.head_int8 is None else f"; the head in int8 adds {found.head_int8:.3g}"
    yield f"all layers in int4: {sum(found.int4):.4g}; all in int8: {found.int8:.3g}{head} (mean KL per token)"
    subject = found.subject
    yield (
        f"measured in fp32 on {subject.num_tokens} tokens in windows of {subject.window_tokens}, weights rounded to "
        f"nearest; an export with --calibration-text does better"
    )


def suggested_budget(found: Sensitivity) -> float:
    """Return the error with the less sensitive half of the layers in 4 bits and the others in 8."""
    order, eight = least_sensitive(found), found.layer_int8
    half = len(order) // 2
    return sum(found.int4[i] for i in order[:half]) + sum(eight[i] for i in order[half:]) + (found.head_int8 or 0.0)
