"""`llamaplan frontier`: it parses, calls the planner, and prints."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli import ask, options
from planner.cli.next_steps import shown
from plans.commands.option_groups import ScreenOptions, with_option_groups

if TYPE_CHECKING:
    from planner.answers.frontier import FrontierPoint

AgainstOption = Annotated[
    Literal["share", "devices", "both"], typer.Option("--against", help="What time is weighed against.")
]
PointsOption = Annotated[int, typer.Option("--points", min=2, max=200, help="Limits on the memory share to try.")]


@with_option_groups
def frontier_command(
    model: options.ModelArgument,
    *,
    against: AgainstOption = "both",
    points: PointsOption = 9,
    objective: options.ObjectiveOption = "latency",
    offer: options.OfferOptions,
    load: options.WorkloadOptions,
    widths: options.WeightOptions,
    prefill_chunk: options.PrefillChunkOption = None,
    execution: options.ExecutionOption = "one_process",
    fixed: options.DemandOptions,
    time_limit: options.TimeLimitOption = 120.0,
    printed: ScreenOptions,
) -> None:
    """Say what a smaller memory share, or fewer devices, would cost in time.

    Example: llamaplan frontier my-model/ --device cuda:0=20GiB --device cpu=32GiB
    """
    from planner.answers.explain import explain_infeasible
    from planner.answers.frontier import frontier_by_devices, frontier_by_share
    from planner.problem.question import Question
    from planner.program.effort import Effort
    from planner.show import frontier as show

    screen = printed.output()
    options.check_time_limit(time_limit)
    asked = ask.read_asked(model, load, offer, weights=widths, prefill_chunk_tokens=prefill_chunk, screen=screen)
    offered = asked.cluster
    question = Question(
        asked.profile, offered, asked.workload, execution=execution, objective=objective, demands=fixed.demands(),
        weights=asked.weights, narrower=asked.narrower,
    )  # fmt: skip
    problem = question.problem()
    with screen.spinner("solving for every point"), Effort(time_limit=time_limit).session() as session:
        shares: list[FrontierPoint] = []
        counts: list[FrontierPoint] = []
        if against != "devices":
            shares = frontier_by_share(problem, objective=objective, session=session, num_points=points)
        if against != "share":
            counts = frontier_by_devices(problem, objective=objective, session=session)
        if not (shares or counts):
            raise explain_infeasible(question)
    tables = {"time against memory share": shares, "time against number of devices": counts}
    screen.data({title.replace(" ", "_"): [show.as_json(p) for p in found] for title, found in tables.items()})
    for title, found in tables.items():
        if found:
            screen.show(f"{title} ({objective}):")
            screen.show(show.frontier_table(found))
    screen.next_step(f"llamaplan solve {shown(model)} --strategy mixed --weight 0.5 -o plan.json")
