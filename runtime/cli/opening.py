"""What every command does first: open, prepare and load a model while a spinner says so, and choose how to sample."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plans.commands.collector import resting_collector
from plans.commands.console import Output
from plans.errors import InputError, UsageError
from runtime.cli.options import LoadingOptions
from runtime.fast.speed import Speed

if TYPE_CHECKING:
    from runtime.distributed.control.launch import LocalWorkers
    from runtime.generate.sampling import Sampling
    from runtime.prepared import Prepared
    from runtime.reading.opening import Source
    from runtime.session import Session


def prepare(
    output: Output,
    target: Path,
    loading: LoadingOptions,
    *,
    only_stage: int | None = None,
    workers: "LocalWorkers | None" = None,
    needs_text: bool = True,
) -> "Prepared":
    """Open what the command was given and read everything but the weights.

    With `only_stage`, the bundles of the other stages may be on other machines. `workers` are started as soon as the
    number of stages is known. A command that works on token ids alone needs no tokenizer.
    """
    with output.spinner("opening", style="line"):
        from runtime.reading.opening import open_source, parse_device_map

        source = open_source(target, model=loading.model, expect_id=loading.expect_id, only_stage=only_stage)
        for warning in source.warnings:
            output.warn(warning)
        places = parse_device_map(loading.device_map or [], num_stages=len(source.stages))
    if workers is not None:
        workers.start_ahead(source.stages, device_map=places)
    _import_libraries(output, workers)
    if workers is not None:  # no spinner turns now: it is a thread, and a process with threads cannot fork
        workers.fork()
    with output.spinner("opening", style="line"):
        return _prepare(output, source, loading, places=places, only_stage=only_stage, needs_text=needs_text)


def _import_libraries(output: Output, workers: "LocalWorkers | None") -> None:
    end_workers = None if workers is None else workers.end
    with (
        output.spinner("opening", style="line"),
        output.leaving_at_once(first=end_workers),
        resting_collector(),
    ):
        import transformers

        import runtime.prepared

        if workers is not None:
            import runtime.distributed.serve  # noqa: F401 - all that a fork will need
    # Our own sentences say what a person needs; the library's advice about its internals does not help here.
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _prepare(
    output: Output,
    source: "Source",
    loading: LoadingOptions,
    *,
    places: Mapping[int, str],
    only_stage: int | None,
    needs_text: bool,
) -> "Prepared":
    import torch

    from runtime.prepared import prepare_session

    if loading.threads is not None:
        torch.set_num_threads(loading.threads)
    prepared = prepare_session(
        source,
        device_map=places,
        dtype=loading.dtype,
        kv_cache_dtype=loading.kv_cache_dtype,
        context_tokens=loading.ctx_size,
        only_stage=only_stage,
        needs_text=needs_text,
    )
    for warning in prepared.warnings:
        output.warn(warning)
    return prepared


def load(
    output: Output,
    prepared: "Prepared",
    *,
    cache_tokens: int | None = None,
    batch_size: int = 1,
    verify: bool = True,
    speed: Speed = Speed.REFERENCE,
) -> "Session":
    """Load the weights of a prepared model; why it cannot be as fast as wanted is said here, once."""
    from runtime.session import load_session

    with output.spinner("loading", style="line") as say:
        session = load_session(
            prepared,
            cache_tokens=cache_tokens,
            batch_size=batch_size,
            verifies=verify,
            speed=speed,
            progress=say,
        )
    if session.chain.reason is not None:
        output.note(f"reference path: {session.chain.reason}")
    return session


def merge_sampling(prepared: "Prepared", choices: dict[str, Any], *, where: str = "--top-k") -> "Sampling":
    """Return the model's own defaults with the given choices on top."""
    from runtime.generate.sampling import Sampling
    from runtime.reading.generation_config import GENERATION_CONFIG_NAME

    if choices.get("top_k", 0) > prepared.vocab_size:
        raise UsageError(
            f"{choices['top_k']} is more than the vocabulary has", where=where, expected=f"0 to {prepared.vocab_size}"
        )
    try:
        defaults = Sampling.from_generation_config(prepared.generation_config)
    except UsageError as error:
        what = error.what.removeprefix("--").replace("-", "_", 1)
        raise InputError(what, where=GENERATION_CONFIG_NAME, expected=error.expected, code="E-CONFIG") from None
    return replace(defaults, **choices)
