"""A plan as one self-contained page: no scripts, nothing fetched, the same bytes every time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from planner import show_compare
from planner.chart_memory import PARTS, memory_drawing, stage_words
from planner.chart_timeline import decode_drawing, prefill_drawing
from planner.chart_topology import topology_drawing
from planner.chart_tradeoff import Point, tradeoff_drawing
from planner.compare import Comparison, Row, compare, stages_of
from planner.costs import CostModel
from planner.drawing import Drawing, number
from planner.origins import MEANINGS, Origin, Source, decode_origin, hop_origin, sources_of
from planner.rules import Split
from planner.show import duration, objective_text, proof_line, unused_devices
from planner.simulate import Simulation, simulate_plan
from planner.trace import trace
from plans.plan import Plan, Stage
from plans.sizes import format_bytes
from plans.strict import dump_json

if TYPE_CHECKING:
    import jinja2

MOST_DEVICES_IN_WORDS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """One of the large numbers at the top."""

    label: str
    value: str
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
    hop_origin: Origin
    busy: str


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One proposal in the comparison, everything already in words."""

    row: Row
    layers: str
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


def render_report(
    plan: Plan, *, comparison: Comparison | None = None, frontier: Sequence[Point] = (), frontier_note: str = ""
) -> str:
    """Return the page as HTML.

    Args:
        plan: a checked plan.
        comparison: what else could be done, from `planner.compare.compare`; left out if None.
        frontier: the Pareto frontier of time against memory share, drawn into the comparison.
        frontier_note: a sentence on how the frontier was made.
    """
    model = CostModel(plan.profile, workload=plan.workload, cluster=plan.cluster, execution=plan.execution)
    simulation = simulate_plan(plan)
    return _templates().get_template("report.html.j2").render(
        plan=plan,
        answer=answer(plan, simulation),
        chain=chain_words(plan),
        proof=proof_line(plan),
        tiles=_tiles(plan, simulation),
        memory=memory_drawing(plan),
        parts=PARTS,
        topology=topology_drawing(plan),
        timelines=(prefill_drawing(simulation, plan), decode_drawing(simulation, plan)),
        rows=_stage_rows(plan, model, simulation),
        return_hop=duration(plan.prediction.return_hop_seconds),
        unused=unused_devices(plan),
        compared=[] if comparison is None else _compare_rows(comparison),
        notes=[] if comparison is None else list(show_compare.note_lines(comparison)),
        tradeoff=None if comparison is None else tradeoff_drawing(comparison, frontier=frontier),
        frontier_note=frontier_note,
        sources=sources_of(plan, model),
        meanings=MEANINGS,
    )  # fmt: skip


def compare_with(plan: Plan, *, time_limit: float | None) -> Comparison:
    """Return what else could be done for a plan's own question; the plan itself is the first row.

    Args:
        time_limit: seconds for each strategy that is solved again.

    Raises:
        MachineError: no solver works here.
    """
    found = compare(
        plan.profile,
        cluster=plan.cluster,
        workload=plan.workload,
        objective=plan.objective,
        weight=0.5 if plan.mixed_weight is None else plan.mixed_weight,
        execution=plan.execution,
        partitions=[("this plan", Split("this plan", stages_of(plan)))],
        time_limit=time_limit,
    )
    return replace(found, rows=(found.rows[-1], *found.rows[:-1]))


def trace_text(plan: Plan) -> str:
    """Return the simulated timeline of a plan for Perfetto, as JSON."""
    return dump_json(trace(simulate_plan(plan)))


def answer(plan: Plan, simulation: Simulation) -> str:
    """Return the plan in one sentence."""
    names = [stage.device for stage in plan.stages]
    where = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    if len(names) > MOST_DEVICES_IN_WORDS:
        where = f"{len(names)} devices"
    num = plan.workload.requests_in_flight
    rate = simulation.pipelined_tokens_per_second if num > 1 else simulation.tokens_per_second
    first = duration(simulation.time_to_first_token_seconds)
    return f"{plan.profile.model.name} runs on {where} at {rate:.3g} tokens per second, the first after {first}."


def chain_words(plan: Plan) -> list[tuple[str, str]]:
    """Return (device, what it holds) in chain order."""
    return [(stage.device, stage_words(stage)) for stage in plan.stages]


def _tiles(plan: Plan, simulation: Simulation) -> list[Tile]:
    work, proof = plan.workload, plan.proof
    fullest = max(plan.stages, key=lambda stage: stage.total_bytes / stage.budget_bytes)
    batch = f"batch {work.batch_size}, " if work.batch_size > 1 else ""
    tiles = [
        Tile("per token", duration(simulation.seconds_per_token), f"{batch}context {work.decode_context_tokens}"),
        Tile("one request", f"{simulation.tokens_per_second:.4g} tokens/s", "alone in the pipeline"),
        Tile("first token", duration(simulation.time_to_first_token_seconds), f"after {work.prompt_tokens} tokens"),
        Tile("fullest device", f"{plan.prediction.max_memory_share:.1%}", fullest.device),
        Tile("proof", proof.status, "by hand" if proof.status == "given" else f"gap {proof.gap:.3g}"),
    ]
    if work.requests_in_flight > 1:
        together = f"{simulation.pipelined_tokens_per_second:.4g} tokens/s"
        tiles.insert(2, Tile("all together", together, f"{work.requests_in_flight} requests in flight"))
    return tiles


def _stage_rows(plan: Plan, model: CostModel, simulation: Simulation) -> list[StageRow]:
    rows = []
    following: list[Stage | None] = [b for _a, b in pairwise(plan.stages)]
    for index, (stage, after) in enumerate(zip(plan.stages, [*following, None], strict=True)):
        way = after.device if after else plan.stages[0].device
        rows.append(
            StageRow(
                number=index + 1,
                stage=stage,
                host=plan.cluster.device(stage.device).host,
                holds=stage_words(stage),
                decode=duration(stage.decode_seconds),
                decode_origin=decode_origin(stage, model),
                prefill=duration(stage.prefill_seconds),
                hop=duration(stage.hop_seconds if after else plan.prediction.return_hop_seconds),
                hop_origin=hop_origin(plan.cluster, stage.device, way, execution=plan.execution),
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
        layers=show_compare.layers_text(row.stages),
        verdict=show_compare.verdict(row),
        per_token="" if score is None else duration(score.seconds_per_token),
        first_token="" if score is None else duration(score.time_to_first_token_seconds),
        rate="" if rate is None else f"{rate:.4g}",
        share="" if share is None else f"{share:.0%}",
        ratio=show_compare.ratio_text(found, row),
        is_best=row is found.best,
        time_bar=seconds / slowest if row.fits and seconds and slowest else 0.0,
        share_bar=min(1.0, share or 0.0),
    )


@cache
def _templates() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planner"),
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


__all__ = ["Drawing", "Point", "Source", "render_report"]
