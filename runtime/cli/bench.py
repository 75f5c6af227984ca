"""`llamarun bench`: how fast is it here?"""

from pathlib import Path
from typing import Annotated

import typer

from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError
from runtime.cli import options
from runtime.cli import processes as several


@with_option_groups
def bench(
    context: typer.Context,
    target: options.Target,
    *,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Random prompt tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2, help="Greedy new tokens.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Runs that medians are taken of.")] = 3,
    loading: options.LoadingOptions,
    team: several.ProcessOptions,
    in_flight: several.InFlightOption = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write what every stage did, for Perfetto; needs --processes.")
    ] = None,
    screen: ScreenOptions,
) -> None:
    """Measure loading, prefill, decode and every stage, against the bandwidth of this machine and the plan.

    GB/s are weight bytes read per second of decoding. Nothing else should be running.

    Example: llamarun bench shards/ --prompt-tokens 128 --new-tokens 64 --repeats 5
    """
    output = screen.output()
    if trace is not None and not team.is_used:
        raise UsageError("a trace is written where stages run side by side", where="--trace", hint="add --processes")
    run = several.open_run(context, target, output=output, loading=loading, team=team, needs_text=False)
    prepared = run.prepared
    if prompt_tokens + new_tokens > prepared.context_tokens:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the context holds "
            f"({prepared.context_tokens})",
            hint="lower --prompt-tokens or --new-tokens, or raise --ctx-size",
            code="E-CONTEXT",
        )

    from runtime.reading.opening import check_sources_unchanged
    from runtime.results.bench import BenchSettings, bench_document, bench_lines

    settings = BenchSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        prefill_chunk_tokens=loading.prefill_chunk or prepared.prefill_chunk_tokens,
        in_flight=several.choose_in_flight(team, prepared, in_flight),
        traces=trace is not None,
    )
    with run.session(
        cache_tokens=prompt_tokens + new_tokens, batch_size=batch_size * settings.in_flight, traces=trace is not None
    ) as session:
        with output.spinner("measuring", style="line"):
            document = bench_document(session, settings)
        if trace is not None:
            several.write_trace(session, trace)
        check_sources_unchanged(session.source)
    output.data(document.as_json())
    for line in bench_lines(document):
        output.show(line)
