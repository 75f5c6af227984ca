"""`llamarun batch`: many prompts from a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plans.console import Output
from plans.errors import UsageError
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import merge_sampling, prepare, refuse_empty_stops, sampling_choices
from runtime.fast.speed import Speed

if TYPE_CHECKING:
    from runtime.batch.run import BatchNumbers
    from runtime.session import AnySession


def batch(
    context: typer.Context,
    target: options.Target,
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"prompt": ...} or {"messages": [...]}, and settings.')],
    results: Annotated[Path, typer.Option("--output", "-o", help="Results as JSON lines; also says what is done.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences at once.")] = 8,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.PenaltyOption = None,
    seed: options.SeedOption = 0,
    stop: options.StopOption = None,
    prefill_chunk: options.ChunkOption = None,
    threads: options.ThreadsOption = None,
    speed: options.SpeedOption = Speed.AUTO,
    model: options.ModelOption = None,
    device_map: options.DeviceMapOption = None,
    dtype: options.DtypeOption = None,
    kv_cache_dtype: options.KvDtypeOption = None,
    ctx_size: options.ContextOption = None,
    expect_id: options.ExpectOption = None,
    verify: options.VerifyOption = True,
    processes: several.ProcessesOption = False,
    listen: several.ListenOption = None,
    key_file: several.KeyOption = None,
    trusted_network: several.TrustedOption = False,
    heartbeat_timeout: several.HeartbeatOption = 30.0,
    join_timeout: several.JoinOption = 60.0,
    world_size: several.WorldOption = None,
    restart: several.RestartOption = False,
    in_flight: several.InFlightOption = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Continue every line of a file; killed at any moment, the same command goes on where it was.

    A line may have an id and its own max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed and stop.
    Random draws depend on the seed and the line's place in the file, never on how lines were batched.

    Example: llamarun batch shards/ prompts.jsonl -o out.jsonl --batch-size 8 -n 100
    """  # fmt: skip
    output = Output(json=as_json, quiet=quiet)
    if results.exists() and prompts.exists() and results.samefile(prompts):
        raise UsageError("the results would overwrite the prompts", where="--output", expected="another file")
    refuse_empty_stops(stop)
    choices = sampling_choices(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    team = several.ProcessChoices(
        processes=processes,
        listen=listen,
        key_file=key_file,
        trusted_network=trusted_network,
        heartbeat_timeout=heartbeat_timeout,
        join_timeout=join_timeout,
        world_size=world_size,
        restart=restart,
    )
    team.check()
    workers = team.workers(context, target, model=model)
    prepared = prepare(
        output,
        target,
        model=model,
        device_map=device_map,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        ctx_size=ctx_size,
        expect_id=expect_id,
        threads=threads,
        only_stage=team.only_stage,
        workers=workers,
    )

    from runtime.batch.input import Defaults, read_jobs
    from runtime.batch.output import ResultFile
    from runtime.batch.run import model_id, run_jobs
    from runtime.generate.limits import Limits

    limits = Limits(
        max_tokens=max_tokens,
        context_tokens=prepared.context_tokens,
        eos_token_ids=prepared.eos_token_ids,
        stop_strings=tuple(stop or ()),
        prefill_chunk_tokens=prefill_chunk or prepared.prefill_chunk_tokens,
    )
    defaults = Defaults(merge_sampling(prepared, choices), limits)
    jobs = read_jobs(prompts, prepared, defaults, model_id=model_id(prepared))
    with ResultFile(results, expected=[job.sha256 for job in jobs]) as file:
        if file.done:
            output.note(f"{len(file.done)} of {len(jobs)} lines are done already")
        longest = max((job.num_tokens for job in jobs if job.index not in file.done), default=1)
        groups = several.choose_in_flight(team, prepared, in_flight)
        start = several.Start(
            output=output,
            prepared=prepared,
            workers=workers,
            threads=threads,
            cache_tokens=longest,
            batch_size=min(batch_size * groups, len(jobs)),
            verify=verify,
            speed=speed,
        )
        try:
            with (
                several.any_session(team, start) as session,
                _progress(output, total=len(jobs), done=len(file.done)) as advance,
            ):
                numbers = run_jobs(session, jobs, file, batch_size=batch_size, in_flight=groups, on_batch=advance)
                _finish(output, session, numbers, results)
        except BaseException:
            output.note(f"{len(file.done)} of {len(jobs)} lines are done; the same command goes on from there")
            raise


@contextmanager
def _progress(output: Output, *, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; yield what is told how many lines were finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_hidden = output.quiet or not output.progress_console.is_terminal
    with Progress(*columns, console=output.progress_console, transient=True, disable=is_hidden) as bar:
        task = bar.add_task("lines", total=total, completed=done)
        yield lambda lines: bar.advance(task, lines)


def _finish(output: Output, session: "AnySession", numbers: "BatchNumbers", results: Path) -> None:
    from runtime.reading.opening import check_sources_unchanged
    from runtime.results.summary import identity

    check_sources_unchanged(session.source)
    output.data(
        {
            **identity(session, kind="batch"),
            "lines": numbers.num_lines,
            "prompt_tokens": numbers.num_prompt_tokens,
            "new_tokens": numbers.num_new_tokens,
            "seconds": numbers.seconds,
            "tokens_per_second": numbers.tokens_per_second,
            "peak_memory_bytes": session.peak_memory_bytes,
        }
    )
    output.note(
        f"{numbers.num_lines} lines, {numbers.num_prompt_tokens} prompt tokens, {numbers.num_new_tokens} new tokens in "
        f"{numbers.seconds:.1f} s: {numbers.tokens_per_second:.1f} tokens/s; results in {results}"
    )
