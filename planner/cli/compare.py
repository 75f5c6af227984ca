"""`llamaplan compare` and `report`: they parse, call the planner, and print."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import ask, options
from planner.cli.next_steps import shown
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError

if TYPE_CHECKING:
    from planner.rivals.rules import Split
    from plans.cluster import Cluster

MOST_CHARACTERS = 40
"""Longer partitions (device maps) are named by their engine alone."""

PartitionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--partition",
        metavar="ENGINE:STRING",
        help="A partition you have: vllm:5,6,5,6, llama.cpp:6,5/ngl=11, accelerate:{...}; repeatable.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("compare")(compare_command)
    app.command("report")(report_command)


CompareTarget = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|PLAN",
        help="A model, as for solve; or a plan, whose own question is then answered in every other way.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What is asked, where it is not a plan's own question."""

    objective: options.ObjectiveOption = "latency"
    weight: options.WeightOption = 0.5
    prefill_chunk: options.PrefillChunkOption = None
    execution: options.ExecutionOption = "one_process"


@with_option_groups
def compare_command(
    target: CompareTarget,
    *,
    partition: PartitionOption = None,
    offer: options.OfferOptions,
    load: options.WorkloadOptions,
    widths: options.WeightOptions,
    wanted: CompareOptions,
    search: options.SearchOptions,
    printed: ScreenOptions,
) -> None:
    """Put all strategies and the rules of other engines side by side, scored by one simulator.

    Example: llamaplan compare my-model/ --device 2xrtx3090=20GiB --device cpu=32GiB --partition vllm:20,12
    """
    from planner.problem.question import Question
    from planner.rivals.alternatives import compare_plan
    from planner.rivals.compare import compare
    from planner.show import compare as show_compare
    from plans.check import read_plan

    screen = printed.output()
    effort = search.effort()
    known = read_plan(Path(target)) if ask.is_plan(target) else None
    if known is not None:
        ask.refuse_given("a plan brings its own question", replace(offer, probe=True), load, widths, wanted)
        question = Question.of(known)
    else:
        asked = ask.read_asked(
            target, load, offer, weights=widths, prefill_chunk_tokens=wanted.prefill_chunk, screen=screen
        )
        question = Question(
            asked.profile,
            asked.cluster,
            asked.workload,
            objective=wanted.objective,
            weight=wanted.weight,
            execution=wanted.execution,
            weights=asked.weights,
            narrower=asked.narrower,
        )
    num_layers = question.profile.model.num_hidden_layers
    given = read_partitions(partition or (), cluster=question.cluster, num_layers=num_layers)
    with screen.spinner(f"comparing on {len(question.cluster.devices)} devices"):
        found = (
            compare(question, effort, partitions=given)
            if known is None
            else compare_plan(known, effort, partitions=given)
        )
    screen.data(show_compare.as_json(found))
    screen.show(show_compare.comparison_table(found))
    for line in show_compare.note_lines(found):
        screen.show(line)
    if known is None:
        screen.next_step(f"llamaplan solve {shown(target)} with the same options and -o plan.json")
    else:
        screen.next_step(f"llamaplan report {shown(target)} -o report.html")


def read_partitions(texts: Sequence[str], *, cluster: "Cluster", num_layers: int) -> "list[tuple[str, Split]]":
    """Return the chains of ``ENGINE:STRING`` partitions, each with the text it came from.

    Raises:
        UsageError: not a partition of that engine, or not one for this cluster.
    """
    from planner.rivals.rules import from_partition
    from plans.engines.spelling import parse_partition

    chains = []
    for text in texts:
        part = parse_partition(text, num_layers=num_layers)
        split = from_partition(
            part.engine, part.ranges, cluster=cluster, devices=part.devices, has_cpu_part=part.has_cpu_part
        )
        chains.append((text if len(text) <= MOST_CHARACTERS else f"{part.engine} partition", split))
    return chains


@with_option_groups
def report_command(
    plan: options.PlanArgument,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Also write the timeline for Perfetto.", show_default=False),
    ] = None,
    compared: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Solve again by every strategy, for the comparison.")
    ] = True,
    time_limit: options.TimeLimitOption = 60.0,
    printed: ScreenOptions,
) -> None:
    """Write a plan as one page that needs nothing else: memory, topology, timeline, alternatives, origins.

    Example: llamaplan report plan.json -o report.html
    """
    from planner.program.effort import Effort
    from planner.report.page import render_report, trace_text
    from planner.rivals.alternatives import alternatives_to
    from plans.check import read_plan
    from plans.reading.files import write_text

    screen = printed.output()
    options.check_time_limit(time_limit)
    refuse_same_file(plan, output, trace)
    known = read_plan(plan)
    with screen.spinner("comparing with other strategies and engines"):
        found = alternatives_to(known, Effort(time_limit=time_limit)) if compared else None
    write_text(output, render_report(known, alternatives=found))
    screen.note(f"wrote {output}")
    if trace is not None:
        write_text(trace, trace_text(known))
        screen.note(f"wrote {trace}; open it at https://ui.perfetto.dev or in chrome://tracing")
    screen.data({"report": str(output), "trace": None if trace is None else str(trace)})
    screen.next_step(f"open {shown(output)} in a browser")


def refuse_same_file(plan: Path, *written: Path | None) -> None:
    """Refuse to write a result over the plan, or two results into one file."""
    paths = [path.absolute().resolve() for path in (plan, *written) if path is not None]
    if len(set(paths)) < len(paths):
        raise UsageError("the plan, --output and --trace are not three different files")
