"""The table of `llamaplan compare`, and the same as plain data."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from planner.rivals.compare import Comparison, Row
from planner.show.words import duration
from plans.commands.console import table
from plans.reading.sizes import format_bytes
from plans.stages import StageRange

if TYPE_CHECKING:
    from rich.table import Table

MAX_STAGES_IN_WORDS = 6
LONG_REASON = 60
"""Characters of a reason that is not repeated in the next row."""
TIME_NAMES = {"latency": "time per token", "request": "time of a whole request", "throughput": "time per pipeline step"}


def comparison_table(found: Comparison) -> "Table":
    """Return one row per strategy, rule and partition; the fastest that fits is bold."""
    numbers = ("per token", "first token", "tokens/s", "fullest", "vs best")
    rows = table("", "layers", numbers=numbers, folded=("layers", "fits"))
    previous, said = "strategy", ""
    for row in found.rows:
        if row.kind != previous:
            rows.add_row()
            previous = row.kind
        words = verdict(row)
        is_said = words == said and len(words) > LONG_REASON
        said = words
        style = "bold" if row is found.best else "" if row.fits else "dim"
        rows.add_row(
            row.name, layers_text(row.stages), *_numbers(found, row), "as above" if is_said else words, style=style
        )
    return rows


def _numbers(found: Comparison, row: Row) -> tuple[str, ...]:
    share = "" if row.max_share is None else f"{row.max_share:.0%}"
    if row.score is None:
        return ("", "", "", share, "")
    score = row.score
    many = found.workload.requests_in_flight > 1
    rate = score.pipelined_tokens_per_second if many else score.tokens_per_second
    return (
        duration(score.seconds_per_token),
        duration(score.time_to_first_token_seconds),
        f"{rate:.4g}",
        share,
        ratio_text(found, row),
    )


def ratio_text(found: Comparison, row: Row) -> str:
    """Return how many times longer a row takes than the fastest that fits, such as ``1.25x``; empty if unknown."""
    best = None if found.best is None else found.seconds(found.best)
    seconds = found.seconds(row)
    return f"{seconds / best:.2f}x" if best and row.fits and seconds is not None else ""


def layers_text(stages: tuple[StageRange, ...]) -> str:
    """Return the layers per device in chain order: ``cuda:0 18, cuda:1 10, cpu 4``; counts alone for long chains."""
    if len(stages) > MAX_STAGES_IN_WORDS:
        return f"{len(stages)} stages: " + ",".join(str(s.num_layers) for s in stages)
    return ", ".join(f"{stage.device} {stage.num_layers or stage.words}" for stage in stages)


def verdict(row: Row) -> str:
    """Return whether a row fits, and if not, what is short or what is wrong."""
    short = [f"{use.device} lacks {format_bytes(use.missing_bytes)}" for use in row.use if use.missing_bytes]
    if row.reason or short:
        return row.reason or ", ".join(short)
    twice = "; a device holds two stages" if row.has_repeats else ""
    proof = (
        "" if row.name == "uniform" else {"optimal": ", proved", "feasible": ", not proved"}.get(row.status or "", "")
    )
    return f"yes{proof}{twice}"


def note_lines(found: Comparison) -> Iterator[str]:
    """Yield what the table has no room for: the remarks on single rows, and how to read the rest."""
    for row in found.rows:
        if row.note:
            yield f"{row.name}: {row.note}"
    if found.best is None:
        yield "nothing fits; 'llamaplan solve' with the same options says what would"
        return
    yield f"vs best: {TIME_NAMES[found.objective]} against the fastest that fits; every row is scored by one simulator"


def as_json(found: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data."""
    return {
        "objective": found.objective,
        "workload": found.workload.model_dump(mode="json"),
        "best": None if found.best is None else found.best.name,
        "rows": [_row_json(found, row) for row in found.rows],
    }


def _row_json(found: Comparison, row: Row) -> dict[str, Any]:
    score = row.score
    times = (
        "seconds_per_token",
        "time_to_first_token_seconds",
        "tokens_per_second",
        "step_period_seconds",
        "pipelined_tokens_per_second",
    )
    return {
        "name": row.name,
        "kind": row.kind,
        "fits": row.fits,
        "status": row.status,
        "reason": row.reason,
        "note": row.note,
        "stages": [asdict(stage) for stage in row.stages],
        "devices": [asdict(use) | {"missing_bytes": use.missing_bytes} for use in row.use],
        "max_memory_share": row.max_share if row.use and all(use.budget_bytes for use in row.use) else None,
        "objective_seconds": found.seconds(row),
        **{key: None if score is None else getattr(score, key) for key in times},
    }
