"""`llamaplan solve`, `show` and `check`: they parse, call the planner, and print."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli import ask, options, weights
from planner.cli.next_steps import after_solve
from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups

if TYPE_CHECKING:
    from planner.answers.capacity import Capacity
    from planner.answers.ladder import LadderAnswer
    from planner.measure.calibrate import Calibration
    from plans.cluster import Cluster
    from plans.plan import Plan
    from plans.profile import ModelProfile


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("solve")(solve_command)
    app.command("show")(show_command)
    app.command("check")(check_command)


@with_option_groups
def solve_command(
    model: options.ModelArgument,
    *,
    strategy: options.StrategyOption = None,
    objective: options.ObjectiveOption = "latency",
    weight: options.WeightOption = 0.5,
    offer: options.OfferOptions,
    speed: options.SpeedOption = "auto",
    calibrate: options.CalibrateOption = None,
    load: options.WorkloadOptions,
    widths: options.AnyWeightOptions,
    prefill_chunk: options.ChunkOption = None,
    execution: options.ExecutionOption = "one_process",
    cut: options.CutOptions,
    search: options.ExactSearchOptions,
    max_ctx: options.MaxContextOption = False,
    max_in_flight: options.MaxInFlightOption = False,
    output: options.OutputOption = None,
    printed: ScreenOptions,
) -> None:
    """Find the best split of a model over devices, and prove it.

    Example: llamaplan solve my-model/ --strategy mixed --device cuda:0=20GiB --device cpu=32GiB -o plan.json
    """
    import time

    from planner.answers.chunking import solve_with_best_chunk
    from planner.answers.solve import solve
    from planner.devices.clusters import for_speed
    from planner.problem.question import Question

    screen = printed.output()
    effort = search.effort()
    widths.check()
    asked = ask.read_asked(
        model, load, offer, weights=widths, prefill_chunk_tokens=ask.chunk_tokens(prefill_chunk), screen=screen,
        speed=speed,
    )  # fmt: skip
    ask.refuse_inside(output, asked.checkpoint.directory)
    offered = for_speed(asked.cluster, speed)
    calibration = None if calibrate is None else calibration_of(calibrate, offered, asked.profile)
    question = Question(
        asked.profile,
        cluster=offered if calibration is None else calibration.cluster,
        workload=asked.workload,
        strategy=strategy or ("compute" if cut.layers is None else "custom"),
        objective=objective,
        weight=weight,
        execution=execution,
        demands=cut.demands(),
        weights=asked.weights,
        narrower=asked.narrower,
    )
    started = time.monotonic()
    solve_one = solve_with_best_chunk if prefill_chunk == ask.AUTO else solve
    plan, ladder = weights.solve_widths(question, asked, widths, effort, solve_one=solve_one, screen=screen)
    with screen.spinner("looking for the largest workload"):
        capacities = capacities_of(plan, max_ctx=max_ctx, max_in_flight=max_in_flight, time_limit=search.time_limit)
    learnt = None if calibration is None else calibration_answer(calibration, plan)
    if output is not None:
        from plans.reading.files import write_text

        write_text(output, plan.to_json())
    found = Found(plan, time.monotonic() - started, asked.origins, tuple(capacities), learnt, ladder)
    found.print_on(screen)
    screen.note(f"solved in {found.seconds:.2f} s" + (f", wrote {output}" if output is not None else ""))
    kept = "the same command with -o plan.json, to keep the plan"
    screen.next_step(kept if output is None else after_solve(plan, output, model=model))


@dataclass(frozen=True, slots=True)
class Found:
    """What a run of `llamaplan solve` has to say."""

    plan: "Plan"
    seconds: float
    origins: tuple[str, ...]
    capacities: "tuple[Capacity, ...]"
    learnt: tuple[dict[str, Any], list[str]] | None
    """What a calibration says, as data and as lines."""
    ladder: "LadderAnswer | None"

    def print_on(self, screen: Output) -> None:
        """Print all of it on stdout."""
        from planner.show import ladder as show_ladder
        from planner.show import plan as show

        extra: dict[str, Any] = {"origins": list(self.origins)} if self.origins else {}
        extra |= {} if self.learnt is None else {"calibration": self.learnt[0]}
        extra |= {} if self.ladder is None else {"ladder": show_ladder.as_json(self.ladder)}
        screen.data(show.as_json(self.plan, solve_seconds=self.seconds, capacities=self.capacities) | extra)
        print_plan(self.plan, screen)
        if self.ladder is not None:
            show_ladder.print_on(screen, self.ladder)
        for line in [*(() if self.learnt is None else self.learnt[1]), *map(show.capacity_line, self.capacities)]:
            screen.show(line)


def calibration_of(path: Path, cluster: "Cluster", profile: "ModelProfile") -> "Calibration":
    """Read a run and correct the cluster by it."""
    from planner.measure.calibrate import calibrate
    from plans.run import read_run

    return calibrate(cluster, profile, read_run(path), where=path)


def calibration_answer(found: "Calibration", plan: "Plan") -> tuple[dict[str, Any], list[str]]:
    """Return what a calibration says about a plan, as data and as lines."""
    from planner.measure.calibrate import same_cut
    from planner.show import calibration as show_calibration

    old = same_cut(plan, found)
    lines = [*show_calibration.calibration_lines(found), show_calibration.gain_line(plan, old)]
    return show_calibration.as_json(found, plan, old), lines


def capacities_of(plan: "Plan", *, max_ctx: bool, max_in_flight: bool, time_limit: float) -> "list[Capacity]":
    """Answer --max-ctx and --max-in-flight for a plan."""
    from planner.answers.capacity import CapacityKey, measure_capacity
    from planner.program.effort import Effort

    wanted: list[CapacityKey] = ["context_tokens"] if max_ctx else []
    wanted += ["requests_in_flight"] if max_in_flight else []
    if not wanted:
        return []
    with Effort(time_limit=time_limit).session() as session:
        return [measure_capacity(plan, key, session=session) for key in wanted]


@with_option_groups
def show_command(plan: options.PlanArgument, *, printed: ScreenOptions) -> None:
    """Print a plan again; it is checked first.

    Example: llamaplan show plan.json
    """
    from planner.show import plan as show
    from plans.check import read_plan

    screen = printed.output()
    known = read_plan(plan)
    screen.data(show.as_json(known))
    print_plan(known, screen)
    screen.next_step(after_solve(known, plan))


@with_option_groups
def check_command(
    plan: options.PlanArgument,
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Also compare with this checkpoint.", show_default=False),
    ] = None,
    printed: ScreenOptions,
) -> None:
    """Recompute a plan's memory and times from what it carries, and compare it with a checkpoint.

    Example: llamaplan check plan.json --model my-model/
    """
    from planner.answers.check import check_against_model, recompute
    from planner.model.find import find_model
    from plans.check import read_plan

    screen = printed.output()
    known = read_plan(plan)
    predicted = recompute(known, where=plan)
    if model is not None:
        for warning in check_against_model(known, find_model(model)):
            screen.warn(warning)
    screen.data({"stages": len(known.stages), "prediction": predicted.model_dump(mode="json"), "model": model})
    against = f"; the tensors of {model} are the plan's" if model is not None else ""
    screen.show(f"sound: {len(known.stages)} stages, memory and times are what the plan's own data give{against}")
    screen.next_step(after_solve(known, plan, model=model))


def print_plan(plan: "Plan", screen: Output) -> None:
    """Print a plan's table and lines on stdout."""
    from planner.show import plan as show

    screen.show(show.headline(plan))
    screen.show(show.stage_table(plan))
    screen.show(show.legend())
    for line in show.summary_lines(plan):
        screen.show(line)
