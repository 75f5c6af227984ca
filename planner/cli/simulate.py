"""`llamaplan simulate`: it parses, calls the simulator, and prints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import options
from planner.cli.next_steps import shown
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError

if TYPE_CHECKING:
    from plans.plan import Plan
    from plans.workload import Request

DEFAULT_REQUESTS = 100

RequestsOption = Annotated[
    int | None,
    typer.Option("--requests", metavar="N", help="How many; unset: 100, or all of a file.", show_default=False),
]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", metavar="PER SECOND", help="Requests per second; unset: all at once.", show_default=False),
]
ArrivalsOption = Annotated[
    str,
    typer.Option(
        "--arrivals",
        metavar="poisson|uniform|FILE",
        help="By chance, evenly, or as recorded in a file with one JSON object per line.",
    ),
]
PlacesOption = Annotated[
    int | None,
    typer.Option(
        "--in-flight", metavar="N", min=1, max=65536, help="Requests in the chain at once; unset: the plan's.",
        show_default=False,
    ),
]  # fmt: skip
SlotsOption = Annotated[
    int | None,
    typer.Option(
        "--slots", metavar="N", min=1, max=65536, show_default=False,
        help="As 'llamarun serve --slots N': sequences that share steps, instead of --in-flight batches.",
    ),
]  # fmt: skip
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="Of arrivals by chance.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Also write the beginning for Perfetto.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("simulate")(simulate_command)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOptions:
    """Which requests come, and when."""

    requests: RequestsOption = None
    rate: RateOption = None
    arrivals: ArrivalsOption = "poisson"
    prompt_tokens: options.PromptTokensOption = None
    new_tokens: options.NewTokensOption = None
    seed: SeedOption = 0


@with_option_groups
def simulate_command(
    plan: options.PlanArgument,
    *,
    coming: ArrivalOptions,
    in_flight: PlacesOption = None,
    slots: SlotsOption = None,
    trace: TraceOption = None,
    printed: ScreenOptions,
) -> None:
    """Let requests arrive at a plan's chain: throughput, waiting, percentiles, who is busy.

    Example: llamaplan simulate plan.json --requests 1000 --rate 2 --in-flight 8
    """
    from planner.show import serving as show_serving
    from planner.simulate.numbers import numbers_of
    from planner.simulate.serving import bus_limit, simulate_requests
    from planner.simulate.slots import simulate_slots
    from planner.simulate.trace import MAX_EVENTS, events_trace
    from plans.check import read_plan
    from plans.reading.files import write_text
    from plans.reading.strict import dump_json

    screen = printed.output()
    known = read_plan(plan)
    if trace is not None and trace.absolute().resolve() == plan.absolute().resolve():
        raise UsageError("--trace would overwrite the plan")
    if slots is not None and in_flight is not None:
        raise UsageError("--slots and --in-flight are two ways to serve", hint="give one of them")
    requests, words = _requests(known, coming)
    most_events = MAX_EVENTS if trace is not None else 0
    with screen.spinner(f"simulating {len(requests)} requests"):
        if slots is None:
            served = simulate_requests(known, requests=requests, in_flight=in_flight, most_events=most_events)
        else:
            served = simulate_slots(known, requests=requests, slots=slots, most_events=most_events)
    numbers = numbers_of(served)
    if trace is not None:
        write_text(trace, dump_json(events_trace([("requests as they arrive", served.events)])))
        screen.note(f"wrote {trace}; open it at https://ui.perfetto.dev or in chrome://tracing")
    screen.data(show_serving.as_json(numbers))
    screen.show(show_serving.headline(known, numbers, arrivals=words, is_batched=slots is None))
    screen.show(show_serving.spread_table(numbers))
    for line in show_serving.summary_lines(known, numbers):
        screen.show(line)
    if slots is None and (most := bus_limit(known)) is not None and numbers.tokens_per_second > most:
        screen.warn(
            f"the stages' memory bus carries {most:.4g} tokens/s of the plan's batches, which is not counted here; "
            "--slots counts it"
        )
    screen.next_step(f"llamaplan report {shown(plan)} -o report.html")


def _requests(plan: "Plan", asked: ArrivalOptions) -> "tuple[Sequence[Request], str]":
    """Return the requests, and in words what they are."""
    from plans.workload import MAX_REQUESTS

    arrivals, rate = asked.arrivals, asked.rate
    _check_range("--requests", asked.requests, most=MAX_REQUESTS)
    if arrivals not in ("poisson", "uniform"):
        if (rate, asked.prompt_tokens, asked.new_tokens) != (None, None, None):
            raise UsageError(f"--arrivals {arrivals} says when requests come and how long they are", hint=(
                "leave --rate, --prompt-tokens and --max-tokens out, or choose poisson or uniform"))  # fmt: skip
        return _recorded(Path(arrivals), asked.requests)
    from planner.model.workloads import MAX_TOKENS
    from planner.simulate.serving import make_requests

    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"--rate is {rate}", expected="above 0")
    _check_range("--prompt-tokens", asked.prompt_tokens, most=MAX_TOKENS)
    _check_range("--max-tokens", asked.new_tokens, most=MAX_TOKENS)
    prompt = asked.prompt_tokens or plan.workload.prompt_tokens
    new = asked.new_tokens or plan.workload.new_tokens
    if new < 1:
        raise UsageError("the plan generates no token", hint="say how many with --max-tokens")
    requests = make_requests(
        asked.requests or DEFAULT_REQUESTS,
        rate=rate,
        process="poisson" if arrivals == "poisson" else "uniform",
        prompt_tokens=prompt,
        new_tokens=new,
        seed=asked.seed,
    )
    when = "all at once" if rate is None else f"{arrivals}, {rate:g} per second"
    return requests, f"{prompt} + {new} tokens, {when}"


def _recorded(path: Path, count: int | None) -> "tuple[Sequence[Request], str]":
    from plans.workload import read_requests

    return read_requests(path)[:count], f"as recorded in {path}"


def _check_range(option: str, value: int | None, *, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise UsageError(f"{option} is {value}", expected=f"1 to {most}")
