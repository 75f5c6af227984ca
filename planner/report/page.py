"""A plan as one self-contained page: no scripts, nothing fetched, the same bytes every time."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.answers.frontier import FrontierPoint
from planner.report.drawing import number
from planner.report.memory import PARTS, memory_drawing
from planner.report.origins import Origin, decode_origin, hop_origin, meanings_for, sources_of
from planner.report.timeline import decode_drawing, prefill_drawing
from planner.report.topology import topology_drawing
from planner.report.tradeoff import Point, tradeoff_drawing
from planner.rivals.alternatives import Alternatives
from planner.rivals.compare import Comparison, Row
from planner.show import compare as show_compare
from planner.show.plan import demands_line, objective_text, proof_line, stored_words, unused_devices, weights_line
from planner.show.words import duration
from planner.simulate.one_plan import Simulation, simulate_plan
from planner.simulate.trace import trace
from planner.timing.costs import CostModel
from plans.plan import Plan, Stage
from plans.reading.sizes import format_bytes
from plans.reading.strict import dump_json

if TYPE_CHECKING:
    import jinja2

MOST_DEVICES_IN_WORDS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the large numbers at the top."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage in the tables, everything already in words."""

    number: int
    stage: Stage
    host: str
    holds: str
    decode: str
    decode_origin: Origin
    prefill: str
    hop: str
    hop_origin: Origin | None
    """None where nothing travels."""
    busy: str


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One proposal in the comparison, everything already in words."""

    row: Row
    layers: list[str]
    verdict: str
    per_token: str
    first_token: str
    rate: str
    share: str
    ratio: str
    is_best: bool
    time_bar: float
    """0 to 1, against the slowest shown."""
    share_bar: float


@dataclass(frozen=True, slots=True)
class OptionRow:
    """The best plan with so many devices, in words."""

    num_devices: int
    layers: list[str]
    time: str
    ratio: str
    share: str
    status: str


def render_report(plan: Plan, *, alternatives: Alternatives | None = None) -> str:
    """Return the page as HTML.

    Args:
        plan: a checked plan.
        alternatives: what else could be done, from `planner.rivals.alternatives.alternatives_to`; left out if None.
    """
    model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution)
    simulation = simulate_plan(plan)
    return _templates().get_template("report.html.j2").render(
        plan=plan,
        answer=answer(plan, simulation),
        stored=stored_words(plan),
        weights=None if plan.weights is None else weights_line(plan.weights, plan.profile),
        chain=chain_words(plan),
        proof=proof_line(plan),
        demands=None if plan.demands is None else demands_line(plan.demands),
        tiles=_tiles(plan, simulation),
        memory=memory_drawing(plan),
        parts=PARTS,
        topology=topology_drawing(plan),
        timelines=(prefill_drawing(simulation, plan), decode_drawing(simulation, plan)),
        rows=_stage_rows(plan, model, simulation),
        return_hop=duration(plan.prediction.return_hop_seconds),
        unused=unused_words(plan),
        **_alternatives(alternatives),
        sources=sources_of(plan, model),
        meanings=meanings_for(plan),
    )  # fmt: skip


def trace_text(plan: Plan) -> str:
    """Return the simulated timeline of a plan for Perfetto, as JSON."""
    return dump_json(trace(simulate_plan(plan)))


def _alternatives(found: Alternatives | None) -> dict[str, Any]:
    if found is None:
        return {"compared": [], "notes": [], "tradeoff": None, "has_frontier": False, "fewer": []}
    line = [Point(option.seconds, option.memory_share, "", "point ours") for option in found.by_share]
    is_proved = all(option.status == "optimal" for option in found.by_share)
    return {
        "compared": _compare_rows(found.comparison),
        "notes": list(show_compare.note_lines(found.comparison)),
        "tradeoff": tradeoff_drawing(found.comparison, frontier=line if is_proved else []),
        "has_frontier": is_proved and len(line) > 1,
        "fewer": [_option_row(option, found.by_devices[-1].seconds) for option in found.by_devices],
    }


def _option_row(option: FrontierPoint, best_seconds: float) -> OptionRow:
    return OptionRow(
        num_devices=len(option.stages),
        layers=show_compare.layers_text(option.stages).split(", "),
        time=duration(option.seconds),
        ratio=f"{option.seconds / best_seconds:.2f}x" if best_seconds else "",
        share=f"{option.memory_share:.1%}",
        status=option.status,
    )


def answer(plan: Plan, simulation: Simulation) -> str:
    """Return the plan in one sentence."""
    names = [stage.device for stage in plan.stages]
    where = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    if len(names) > MOST_DEVICES_IN_WORDS:
        where = f"{len(names)} devices"
    num = plan.workload.requests_in_flight
    rate = simulation.pipelined_tokens_per_second if num > 1 else simulation.tokens_per_second
    first = duration(simulation.time_to_first_token_seconds)
    return (
        f"{plan.profile.model.name} runs on {where} at {_rate_text(rate)} tokens per second, the first after {first}."
    )


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def chain_words(plan: Plan) -> list[tuple[str, str]]:
    """Return (device, what it holds) in chain order."""
    return [(stage.device, stage.words) for stage in plan.ranges]


def unused_words(plan: Plan) -> str:
    """Return which devices hold nothing, and whether it is known that nothing is lost by it; empty if all are used."""
    names = ", ".join(unused_devices(plan))
    is_proved = plan.proof.status == "optimal" and plan.strategy in ("compute", "memory", "mixed")
    return f"Not used: {names}{'; no plan gains by it' if is_proved else ''}." if names else ""


def _tiles(plan: Plan, simulation: Simulation) -> list[Tile]:
    work, proof = plan.workload, plan.proof
    fullest = max(plan.stages, key=lambda stage: stage.total_bytes / stage.budget_bytes)
    batch = f"batch {work.batch_size}, " if work.batch_size > 1 else ""
    tiles = [
        _tile("per token", duration(simulation.seconds_per_token), f"{batch}context {work.decode_context_tokens}"),
        _tile("one request", f"{simulation.tokens_per_second:.4g} tokens/s", "alone in the pipeline"),
        _tile("first token", duration(simulation.time_to_first_token_seconds), f"after {work.prompt_tokens} tokens"),
        _tile("fullest device", f"{plan.prediction.max_memory_share:.1%}", fullest.device),
        _tile("proof", proof.status, "by hand" if proof.status == "given" else f"gap {proof.gap:.3g}"),
    ]
    if work.requests_in_flight > 1:
        together = f"{simulation.pipelined_tokens_per_second:.4g} tokens/s"
        tiles.insert(2, _tile("all together", together, f"{work.requests_in_flight} requests in flight"))
    return tiles


def _tile(label: str, text: str, detail: str) -> Tile:
    value, _space, unit = text.partition(" ")
    return Tile(label, value, unit, detail)


def _stage_rows(plan: Plan, model: CostModel, simulation: Simulation) -> list[StageRow]:
    num_stages = len(plan.stages)
    rows = []
    for index, stage in enumerate(plan.stages):
        is_last, way = index == num_stages - 1, plan.stages[(index + 1) % num_stages].device
        hop = plan.prediction.return_hop_seconds if is_last else stage.hop_seconds
        origin = hop_origin(plan.cluster, stage.device, way, execution=plan.execution) if num_stages > 1 else None
        rows.append(
            StageRow(
                number=index,
                stage=stage,
                host=plan.cluster.device(stage.device).host,
                holds=stage.range.words,
                decode=duration(stage.decode_seconds),
                decode_origin=decode_origin(stage, model),
                prefill=duration(stage.prefill_seconds),
                hop=duration(hop) if num_stages > 1 else "-",
                hop_origin=origin,
                busy=f"{min(1.0, simulation.busy_shares[index]):.0%}",
            )
        )
    return rows


def _compare_rows(found: Comparison) -> list[CompareRow]:
    fitting = [found.seconds(row) or 0.0 for row in found.rows if row.fits]
    slowest = max(fitting, default=0.0)
    return [_compare_row(found, row, slowest) for row in found.rows]


def _compare_row(found: Comparison, row: Row, slowest: float) -> CompareRow:
    score, share, seconds = row.score, row.max_share, found.seconds(row)
    many = found.workload.requests_in_flight > 1
    rate = None if score is None else score.pipelined_tokens_per_second if many else score.tokens_per_second
    return CompareRow(
        row=row,
        layers=show_compare.layers_text(row.stages).split(", ") if row.stages else [],
        verdict=show_compare.verdict(row),
        per_token="" if score is None else duration(score.seconds_per_token),
        first_token="" if score is None else duration(score.time_to_first_token_seconds),
        rate="" if rate is None else f"{rate:.4g}",
        share="" if share is None else f"{share:.1%}",
        ratio=show_compare.ratio_text(found, row),
        is_best=row is found.best,
        time_bar=seconds / slowest if row.fits and seconds and slowest else 0.0,
        share_bar=min(1.0, share or 0.0),
    )


@cache
def _templates() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planner.report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["bytes"] = format_bytes
    environment.filters["num"] = number
    environment.globals["objective_text"] = objective_text
    return environment
