"""`llamaplan frontier`: it parses, calls the planner, and prints."""

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli import ask, options
from plans.commands.console import Output

if TYPE_CHECKING:
    from planner.answers.frontier import FrontierPoint

AgainstOption = Annotated[
    Literal["share", "devices", "both"], typer.Option("--against", help="What time is weighed against.")
]
PointsOption = Annotated[int, typer.Option("--points", min=2, max=200, help="Limits on the memory share to try.")]


def frontier_command(
    model: options.ModelArgument,
    *,
    against: AgainstOption = "both",
    points: PointsOption = 9,
    objective: options.ObjectiveOption = "latency",
    cluster: options.ClusterOption = None,
    device: options.DeviceOption = None,
    margin: options.MarginOption = None,
    ctx_size: options.ContextOption = None,
    prompt_tokens: options.PromptTokensOption = None,
    new_tokens: options.NewTokensOption = None,
    batch_size: options.BatchOption = 1,
    requests_in_flight: options.InFlightOption = 1,
    prefill_chunk: options.PrefillChunkOption = None,
    dtype: options.DtypeOption = None,
    kv_cache_dtype: options.KvDtypeOption = None,
    execution: options.ExecutionOption = "one_process",
    pin: options.PinOption = None,
    ban: options.BanOption = None,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Stages follow the order of the devices.")] = False,
    time_limit: options.TimeLimitOption = 120.0,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Say what a smaller memory share, or fewer devices, would cost in time.

    Example: llamaplan frontier my-model/ --device cuda:0=20GiB --device cpu=32GiB
    """
    from planner.answers.explain import explain_infeasible
    from planner.answers.frontier import frontier_by_devices, frontier_by_share
    from planner.devices.clusters import load_cluster
    from planner.model.find import find_model
    from planner.model.profile import build_profile
    from planner.model.workloads import make_workload, parse_dtype
    from planner.problem.question import Question
    from planner.program.effort import Effort
    from planner.show import frontier as show
    from plans.checkpoint.folder import open_checkpoint

    screen = Output(json=as_json, quiet=quiet)
    ask.check_time_limit(time_limit)
    chosen, kv_chosen = parse_dtype(dtype), parse_dtype(kv_cache_dtype, option="--kv-cache-dtype")
    checkpoint = open_checkpoint(find_model(model))
    profile = build_profile(checkpoint, dtype=chosen, kv_cache_dtype=kv_chosen)
    workload = make_workload(
        profile,
        ctx_size=ctx_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        requests_in_flight=requests_in_flight,
        prefill_chunk_tokens=prefill_chunk,
    )
    offered = load_cluster(cluster, devices=device, margins=margin)
    demands = ask.demands_of(pin, ban, keep_order=keep_order)
    question = Question(profile, offered, workload, execution=execution, objective=objective, demands=demands)
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
    screen.data({title.replace(" ", "_"): [show.as_json(problem, p) for p in found] for title, found in tables.items()})
    for title, found in tables.items():
        if found:
            screen.show(f"{title} ({objective}):")
            screen.show(show.frontier_table(problem, found))
    screen.next_step(f"llamaplan solve {shlex.quote(model)} --strategy mixed --weight 0.5 -o plan.json")
