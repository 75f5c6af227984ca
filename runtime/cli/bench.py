"""`llamarun bench`: how fast is it here?"""

from pathlib import Path
from typing import Annotated

import typer

from plans.console import Output
from plans.errors import UsageError
from runtime.cli import options
from runtime.cli import processes as several
from runtime.cli.opening import prepare
from runtime.fast.speed import Speed


def bench(
    context: typer.Context,
    target: options.Target,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Random prompt tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2, help="Greedy new tokens.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=65536, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Runs that medians are taken of.")] = 3,
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
    in_flight: several.InFlightOption = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write what every stage did, for Perfetto; needs --processes.")
    ] = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure loading, prefill, decode and every stage, against the bandwidth of this machine and the plan.

    GB/s are weight bytes read per second of decoding. Nothing else should be running.

    Example: llamarun bench shards/ --prompt-tokens 128 --new-tokens 64 --repeats 5
    """
    output = Output(json=as_json, quiet=quiet)
    team = several.ProcessChoices(
        processes=processes,
        listen=listen,
        key_file=key_file,
        trusted_network=trusted_network,
        heartbeat_timeout=heartbeat_timeout,
        join_timeout=join_timeout,
        world_size=world_size,
    )
    team.check()
    if trace is not None and not team.is_used:
        raise UsageError("a trace is written where stages run side by side", where="--trace", hint="add --processes")
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
    if prompt_tokens + new_tokens > prepared.context_tokens:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the context holds "
            f"({prepared.context_tokens})",
            hint="lower --prompt-tokens or --new-tokens, or raise --ctx-size",
            code="E-CONTEXT",
        )

    from runtime.reading.opening import check_sources_unchanged
    from runtime.results.bench import BenchSettings, bench_document, bench_lines
    from runtime.results.summary import stage_line

    settings = BenchSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        prefill_chunk_tokens=prefill_chunk or prepared.prefill_chunk_tokens,
        in_flight=several.choose_in_flight(team, prepared, in_flight),
        traces=trace is not None,
    )
    start = several.Start(
        output=output,
        prepared=prepared,
        workers=workers,
        threads=threads,
        cache_tokens=prompt_tokens + new_tokens,
        batch_size=batch_size * settings.in_flight,
        verify=verify,
        speed=speed,
        traces=trace is not None,
    )
    with several.any_session(team, start) as session:
        with output.progress_console.status("measuring", spinner="line"):
            document = bench_document(session, settings)
        if trace is not None:
            several.write_trace(session, trace)
        check_sources_unchanged(session.source)
    output.data(document)
    for line in bench_lines(document):
        output.show(line)
    for number, stage in enumerate(document["stages"]):
        output.show(stage_line(number, stage))
