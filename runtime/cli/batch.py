"""`llamarun batch`: many prompts from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.commands.console import Output
from plans.commands.option_groups import ScreenOptions, with_option_groups
from plans.errors import UsageError
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import merge_sampling

if TYPE_CHECKING:
    from runtime.batch.run import BatchNumbers
    from runtime.session import AnySession


@with_option_groups
def batch(
    context: typer.Context,
    target: options.Target,
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": ...} or {"messages": [...]}, and settings.')],
    results: Annotated[Path, typer.Option("--output", "-o", help="Results as JSON lines; also says what is done.")],
    *,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences at once.")] = 8,
    length: options.LengthOptions,
    sampling: options.SamplingOptions,
    loading: options.LoadingOptions,
    team: several.RestartOptions,
    in_flight: several.InFlightOption = None,
    screen: ScreenOptions,
) -> None:
    """Continue every line of a file; killed at any moment, the same command goes on where it was.

    A line may have an id and its own max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed and stop.
    Random draws depend on the seed and the line's place in the file, never on how lines were batched.

    Example: llamarun batch shards/ prompts.jsonl -o out.jsonl --batch-size 8 -n 100
    """  # fmt: skip
    output = screen.output()
    if results.exists() and prompts.exists() and results.samefile(prompts):
        raise UsageError("the results would overwrite the prompts", where="--output", expected="another file")
    stop_strings = length.stop_strings
    choices = sampling.given()
    run = several.open_run(context, target, output=output, loading=loading, team=team)
    prepared = run.prepared

    from runtime.batch.input import Defaults, read_jobs
    from runtime.batch.output import ResultFile
    from runtime.batch.run import model_id, run_jobs

    limits = prepared.limits(
        max_tokens=length.max_tokens, stop_strings=stop_strings, prefill_chunk_tokens=loading.prefill_chunk
    )
    defaults = Defaults(merge_sampling(prepared, choices), limits)
    jobs = read_jobs(prompts, prepared, defaults, model_id=model_id(prepared))
    with ResultFile(results, expected=[job.sha256 for job in jobs]) as file:
        if file.done:
            output.note(f"{len(file.done)} of {len(jobs)} lines are done already")
        longest = max((job.num_tokens for job in jobs if job.index not in file.done), default=1)
        groups = several.choose_in_flight(team, prepared, in_flight)
        try:
            with (
                run.session(cache_tokens=longest, batch_size=min(batch_size * groups, len(jobs))) as session,
                output.progress("lines", done=len(file.done), total=len(jobs), unit="items") as bar,
            ):
                numbers = run_jobs(
                    session,
                    jobs,
                    file,
                    batch_size=batch_size * groups,
                    on_line=lambda: bar(len(file.done), len(jobs)),
                )
                _finish(output, session, numbers, results)
        except BaseException:
            output.note(f"{len(file.done)} of {len(jobs)} lines are done; the same command goes on from there")
            raise


def _finish(output: Output, session: "AnySession", numbers: "BatchNumbers", results: Path) -> None:
    from plans.run import BatchRun
    from runtime.reading.opening import check_sources_unchanged
    from runtime.results.summary import identity

    check_sources_unchanged(session.source)
    document = BatchRun(
        **identity(session),
        kind="batch",
        lines=numbers.num_lines,
        prompt_tokens=numbers.num_prompt_tokens,
        new_tokens=numbers.num_new_tokens,
        seconds=numbers.seconds,
        tokens_per_second=numbers.tokens_per_second,
        peak_memory_bytes=session.peak_memory_bytes,
    )
    output.data(document.as_json())
    output.note(
        f"{numbers.num_lines} lines, {numbers.num_prompt_tokens} prompt tokens, {numbers.num_new_tokens} new tokens in "
        f"{numbers.seconds:.1f} s: {numbers.tokens_per_second:.1f} tokens/s; results in {results}"
    )
