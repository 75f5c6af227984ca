"""The best of the ladder beside what uniform widths would have given, as a person sees it in a terminal."""

from typing import TYPE_CHECKING, Any

from planner.answers.ladder import Answered, LadderAnswer
from planner.answers.solve import objective_seconds
from planner.show.words import duration
from plans.commands.console import Output, table

if TYPE_CHECKING:
    from rich.table import Table


def print_on(screen: Output, found: LadderAnswer) -> None:
    """Print the comparison with uniform widths, and how far the ladder was climbed."""
    screen.show(uniform_table(found))
    screen.show(climb_line(found))


def uniform_table(found: LadderAnswer) -> "Table":
    """Return one row for the best of the ladder, and one per uniform width."""
    objective = {"latency": "per token", "request": "per request", "throughput": "per step"}[found.best.objective]
    rows = table("layers in", "", numbers=("expected error", objective))
    words = found.best.weights.words if found.best.weights is not None else found.best.profile.dtype
    rows.add_row(words, "the best of the ladder", f"{found.error:.4g}", duration(objective_seconds(found.best)))
    for answer in found.uniform:
        fits = _verdict(answer, found.budget)
        seconds = "" if answer.plan is None else duration(objective_seconds(answer.plan))
        rows.add_row(answer.rung.name, fits, f"{answer.rung.error:.4g}", seconds)
    return rows


def _verdict(answer: Answered, budget: float) -> str:
    if answer.plan is None:
        return "not solved in time" if answer.is_open else "does not fit"
    return "fits" if answer.rung.error <= budget else f"fits, but costs more than {budget:g}"


def climb_line(found: LadderAnswer) -> str:
    """Return how many rungs there were to choose from, and what is known about those that were not solved."""
    rest = found.num_allowed - found.num_solved
    known = "all of them solved" if rest <= 0 else f"{rest} of them proved to be no faster without solving them"
    late = "" if found.is_complete else "; the time was up before all that had to be solved was"
    allowed = f"{found.num_allowed} of {found.num_rungs} rungs are within an error of {found.budget:g}"
    return f"ladder: {allowed}, {known}{late}"


def as_json(found: LadderAnswer) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "error": found.error,
        "budget": found.budget,
        "num_rungs": found.num_rungs,
        "num_allowed": found.num_allowed,
        "num_solved": found.num_solved,
        "is_complete": found.is_complete,
        "uniform": [_uniform_json(answer) for answer in found.uniform],
    }


def _uniform_json(answer: Answered) -> dict[str, Any]:
    plan = answer.plan
    return {
        "weights": answer.rung.name,
        "error": answer.rung.error,
        "fits": None if answer.is_open else plan is not None,
        "seconds": None if plan is None else objective_seconds(plan),
        "seconds_per_token": None if plan is None else plan.prediction.seconds_per_token,
    }
