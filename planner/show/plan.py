"""A plan as a person sees it in a terminal: memory bars, the chain with its hops, the times, the proof."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from planner.show.words import duration
from plans.commands.console import table
from plans.errors import printable
from plans.packed.choice import AS_STORED, WeightChoice, WeightError
from plans.plan import Demands, Plan, Stage
from plans.profile import ModelProfile
from plans.reading.sizes import format_bytes

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from planner.answers.capacity import Capacity

BAR_CELLS = 24
_PARTS = (
    ("weights", "weight_bytes", "█", "cyan"),
    ("KV cache", "kv_cache_bytes", "▓", "magenta"),
    ("activations", "activation_bytes", "▒", "yellow"),
    ("overhead", "overhead_bytes", "░", "blue"),
)
_FREE = "·"


def headline(plan: Plan) -> str:
    """Return one line saying what was planned."""
    work = plan.workload
    weight = "" if plan.mixed_weight is None else f", weight {plan.mixed_weight:g}"
    batch = f", batch {work.batch_size}" * (work.batch_size > 1)
    flight = f", {work.requests_in_flight} in flight" * (work.requests_in_flight > 1)
    flight += f", prefill in chunks of {work.prefill_chunk_tokens}" * (work.prefill_chunk_tokens < work.prompt_tokens)
    model = plan.profile.model
    return (
        f"{model.name}: {model.num_hidden_layers} layers in {stored_words(plan)}, context "
        f"{work.context_tokens}, {work.prompt_tokens} + {work.new_tokens} tokens{batch}{flight}; "
        f"strategy {plan.strategy} ({plan.objective}{weight})"
    )


def stored_words(plan: Plan) -> str:
    """Return how the layers are stored, such as `bf16` or `int4`."""
    model = plan.profile.model
    if plan.weights is not None:
        return plan.weights.words
    return str(model.quantization) if model.source == "gguf" else model.packing or plan.workload.dtype


def weights_line(choice: WeightChoice, profile: ModelProfile) -> str:
    """Return what the export of a plan packs, and what it leaves alone."""
    layers = Counter(choice.layer_bits)
    parts = [f"{layers[bits]} layers in int{bits}" for bits in (4, 8) if layers[bits]]
    parts += [f"{layers[AS_STORED]} layers in {profile.dtype}"] * (layers[AS_STORED] > 0)
    head = f"int{choice.head_bits}" if choice.head_bits != AS_STORED else profile.dtype + " (tied)" * profile.tied
    size, error = format_bytes(profile.total_weight_bytes), choice.error
    cost = "" if error is None else f"; {error_words(error)}"
    held = f"{', '.join(parts)} (groups of {choice.group_size}), the head in {head}, the rest in {profile.dtype}"
    return f"weights: {held}; {size} in all{cost}"


def error_words(error: WeightError) -> str:
    """Return what a choice is expected to cost, and what it may cost."""
    budget = "" if error.budget is None else f" of {error.budget:g} allowed, the best of the ladder"
    return f"expected error {error.expected:.4g}{budget} (mean KL per token)"


def stage_table(plan: Plan) -> "Table":
    """Return one row per stage with a stacked memory bar."""
    found = table("device", "holds", "memory", numbers=("used", "budget", "share", "per token"))
    for stage in plan.stages:
        found.add_row(
            stage.device,
            stage.range.short_words,
            memory_bar(stage),
            format_bytes(stage.total_bytes),
            format_bytes(stage.budget_bytes),
            f"{stage.total_bytes / stage.budget_bytes:.1%}",
            duration(stage.decode_seconds),
        )
    return found


def memory_bar(stage: Stage, *, cells: int = BAR_CELLS) -> "Text":
    """Return weights, KV cache, activations, overhead and free memory as one bar of `cells` characters.

    The part boundaries are rounded, not the parts, so that the bar has exactly `cells` cells.
    """
    from rich.text import Text

    bar = Text()
    done = filled = 0
    for _label, key, symbol, colour in _PARTS:
        done += getattr(stage, key)
        end = min(cells, round(cells * done / stage.budget_bytes))
        bar.append(symbol * (end - filled), style=colour)
        filled = end
    bar.append(_FREE * (cells - filled), style="dim")
    return bar


def legend() -> "Text":
    """Return the line that explains the bars."""
    from rich.text import Text

    text = Text("memory: ")
    for label, _key, symbol, colour in _PARTS:
        text.append(symbol, style=colour).append(f" {label}  ")
    return text.append(_FREE, style="dim").append(" free")


def summary_lines(plan: Plan) -> Iterator[str]:
    """Yield the chain, the predicted times, the proof, and what was left out or given up."""
    yield chain_line(plan)
    if plan.demands is not None:
        yield demands_line(plan.demands)
    if plan.weights is not None:
        yield weights_line(plan.weights, plan.profile)
    yield from _time_lines(plan)
    if plan.trade_off is not None:
        trade = plan.trade_off
        yield (
            f"mixed gives up {trade.time_given_up:.1%} of time (best alone {duration(trade.best_time_seconds)}) "
            f"and {trade.memory_share_given_up:.1%} of memory share (best alone {trade.best_memory_share:.1%})"
        )
    yield proof_line(plan)
    unused = unused_devices(plan)
    if unused:
        yield f"not used: {', '.join(unused)}"


def chain_line(plan: Plan) -> str:
    """Return the devices in chain order with the time of every hop."""
    parts = [f"{stage.device} -{duration(stage.hop_seconds)}-> " for stage in plan.stages[:-1]]
    parts.append(plan.stages[-1].device)
    if len(plan.stages) > 1:
        parts.append(f" -{duration(plan.prediction.return_hop_seconds)}-> back to {plan.stages[0].device}")
    return "chain: " + "".join(parts)


def demands_line(demands: Demands) -> str:
    """Return what the user fixed by hand; layer numbers are inclusive, as in the table."""
    parts = [_said(pin) for pin in demands.pins] + [f"not {_said(ban)}" for ban in demands.bans]
    if demands.layers is not None:
        parts.append(_said(demands.layers) if "@" in demands.layers else f"layers {printable(demands.layers)}")
    parts += ["devices in their order"] * demands.keep_order + ["every device"] * demands.use_all
    return f"asked for: {', '.join(parts)}"


def _said(demand: str) -> str:
    """Return ``0-4@cpu`` as ``layers 0-3 on cpu``."""

    def layers(match: re.Match[str]) -> str:
        start, last = int(match[1]), int(match[2] or int(match[1]) + 1) - 1
        if last > start:
            return f"layers {start}-{last} on "
        return f"layer {start} on " if last == start else "no layer on "

    worded = re.sub(r"\b(\d{1,5})(?:-(\d{1,5}))?@", layers, printable(demand))
    return worded.replace("@", " on ").replace(",", ", ")


def _time_lines(plan: Plan) -> Iterator[str]:
    predicted = plan.prediction
    first = duration(predicted.time_to_first_token_seconds)
    yield (
        f"predicted: {duration(predicted.seconds_per_token)} per token "
        f"({predicted.tokens_per_second:.4g} tokens/s), {first} to the first token"
    )
    if plan.workload.requests_in_flight > 1:
        yield (
            f"with {plan.workload.requests_in_flight} in flight: "
            f"{predicted.pipelined_tokens_per_second:.4g} tokens/s altogether"
        )


def proof_line(plan: Plan) -> str:
    """Return what is known about the plan, and who proved it."""
    proof = plan.proof
    value = objective_text(plan, proof.objective)
    by = f"{proof.solver} {proof.solver_version}"
    if proof.status == "given":
        return f"given by hand: {value}; checked, not optimised"
    if proof.status != "optimal":
        least = objective_text(plan, proof.bound)
        return f"feasible, not proved: {value}; {by} excludes less than {least} (gap {proof.gap:.2%})"
    if proof.solver == "none":
        return f"optimal: {value}, proved by {proof.certified_by}; the integer program was stopped before its proof"
    again = f" and again by {proof.certified_by}" if proof.certified_by else "; no second method reaches this size"
    return f"optimal: {value}, proved by {by}{again}"


def objective_text(plan: Plan, value: float) -> str:
    """Return a value of the plan's objective with its unit."""
    if plan.strategy == "memory":
        return f"largest memory share {value:.2%}"
    if plan.strategy == "mixed":
        return f"weighted sum {value:.4f}"
    names = {"latency": "per token", "request": "per request", "throughput": "per step"}
    return f"{duration(value)} {names[plan.objective]}"


def unused_devices(plan: Plan) -> list[str]:
    """Return the devices of the cluster that hold nothing."""
    used = {stage.device for stage in plan.stages}
    return [device.name for device in plan.cluster.devices if device.name not in used]


def capacity_line(capacity: "Capacity") -> str:
    """Return how far a number of the workload may rise, and who proved that it may rise no further."""
    name = {"context_tokens": "context", "requests_in_flight": "requests in flight"}[capacity.key]
    proved = " and ".join(capacity.proved_by)
    beyond = f"{capacity.any_cut + 1} proved infeasible by {proved}" if proved else "as many as can be asked for"
    return f"largest {name}: {capacity.this_cut} with this cut, {capacity.any_cut} with any cut ({beyond})"


def as_json(plan: Plan, *, solve_seconds: float | None = None, capacities: "Sequence[Capacity]" = ()) -> dict[str, Any]:
    """Return the plan's own keys, and beside them what only this run knows."""
    extra: dict[str, Any] = {"unused_devices": unused_devices(plan)}
    if capacities:
        extra["capacities"] = [asdict(capacity) for capacity in capacities]
    if solve_seconds is not None:
        extra["solve_seconds"] = solve_seconds
    return plan.model_dump(mode="json", by_alias=True) | extra
