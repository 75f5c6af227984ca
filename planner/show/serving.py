"""A simulation of requests as a person sees it in a terminal, and the same as plain data."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from planner.show.words import duration
from planner.simulate.numbers import ServingNumbers, Spread
from plans.commands.console import table
from plans.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def headline(plan: Plan, numbers: ServingNumbers, *, arrivals: str, is_batched: bool) -> str:
    """Return one line saying what was simulated; `is_batched` if a request is a batch of the plan's size."""
    batch = f" of {plan.workload.batch_size} sequences each" if is_batched and plan.workload.batch_size > 1 else ""
    stages = f"{len(plan.stages)} stages" if len(plan.stages) > 1 else "1 stage"
    return (
        f"{plan.profile.model.name} over {stages}, at most {numbers.in_flight} in flight: "
        f"{numbers.num_requests} requests{batch}, {arrivals}"
    )


def spread_table(numbers: ServingNumbers) -> "Table":
    """Return one row per quantity with its mean and percentiles."""
    rows = table("", numbers=_COLUMNS)
    for name, found in _spreads(numbers):
        rows.add_row(name, *(duration(getattr(found, column)) for column in _COLUMNS))
    return rows


def _spreads(numbers: ServingNumbers) -> Iterator[tuple[str, Spread]]:
    yield "waiting for a place", numbers.waiting
    yield "first token", numbers.time_to_first_token
    if numbers.time_per_token is not None:
        yield "per token", numbers.time_per_token
    yield "whole request", numbers.latency


def summary_lines(plan: Plan, numbers: ServingNumbers) -> Iterator[str]:
    """Yield throughput, who was busy, and what limits."""
    yield (
        f"throughput: {numbers.tokens_per_second:.4g} tokens/s, {numbers.requests_per_second:.4g} requests/s over "
        f"{duration(numbers.seconds)}, {numbers.mean_in_flight:.3g} in flight on average"
    )
    devices = {stage.device for stage in plan.stages}
    links = {name: share for name, share in numbers.busy_shares.items() if name not in devices}
    yield "busy: " + ", ".join(f"{s.device} {numbers.busy_shares[s.device]:.0%}" for s in plan.stages)
    if len(plan.stages) > 1:
        yield "links busy: " + ", ".join(f"{name} {share:.0%}" for name, share in links.items())
    if numbers.falls_behind:
        yield "more arrived than this chain can serve: the queue grew until the last request had come"


def as_json(numbers: ServingNumbers) -> dict[str, Any]:
    """Return the numbers as plain data, with units in the keys."""
    values = asdict(numbers)
    for key in ("time_to_first_token", "time_per_token", "waiting", "latency"):
        values[f"{key}_seconds"] = values.pop(key)
    return values
