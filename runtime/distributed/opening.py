"""Start a session of several processes: workers, their loading, and the connections between them."""

import time
from collections.abc import Callable

from plans.stages import stage_names
from runtime.distributed.control.acceptor import Acceptor
from runtime.distributed.control.address import listen
from runtime.distributed.control.identity import identity_of
from runtime.distributed.control.launch import LocalWorkers
from runtime.distributed.control.members import describe, exit_code_of
from runtime.distributed.control.messages import Job
from runtime.distributed.control.team import Team
from runtime.distributed.loading import LoadSettings, load_stage, share_threads
from runtime.distributed.session import ProcessSession, ProcessSettings
from runtime.prepared import Prepared


def open_processes(
    prepared: Prepared,
    settings: ProcessSettings,
    *,
    cache_tokens: int | None = None,
    batch_size: int = 1,
    verifies: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> ProcessSession:
    """Start the workers or wait for them, load every stage in its own process, and connect them.

    Args:
        prepared: the model.
        settings: how the processes are started.
        cache_tokens: the longest any sequence will become; None for the whole context.
        batch_size: sequences whose caches are kept at once.
        verifies: compare the weights with the export's checksums.
        progress: told what is being done.

    Raises:
        PeerError: a worker did not join, was refused, or was lost.
        LlamaplanError: whatever a stage failed to load with.
    """
    started = time.perf_counter()
    source = prepared.source
    load = LoadSettings(
        dtype=prepared.dtype,
        kv_cache_dtype=prepared.kv_cache_dtype,
        device=prepared.device_map.get(0),
        verifies=verifies,
        cache_tokens=min(cache_tokens or prepared.context_tokens, prepared.context_tokens),
        batch_size=batch_size,
        speed=settings.speed,
    )
    threads = share_threads(settings.threads, num_processes=len(source.stages) if settings.workers else 1)
    team = _team(prepared, settings, load, threads=threads, progress=progress)
    try:
        if settings.workers is not None:
            _take_workers(team, settings.workers)
        else:
            _listen(team, settings)
        loaded = load_stage(source, 0, load, progress=lambda text: progress(f"{team.names[0]}: {text}"))
        team.wait_until_loaded()
    except BaseException as error:
        team.abort(exit_code=exit_code_of(error), line=f"the driver ended the run: {describe(error)}")
        raise
    session = ProcessSession(prepared, team, loaded, settings)
    try:
        session.connect()
    except BaseException as error:
        session.close(error)
        raise
    session.load_seconds = time.perf_counter() - started
    return session


def _team(
    prepared: Prepared,
    settings: ProcessSettings,
    load: LoadSettings,
    *,
    threads: int,
    progress: Callable[[str], None],
) -> Team:
    def job(rank: int) -> Job:
        return Job(
            dtype=load.dtype,
            kv_cache_dtype=load.kv_cache_dtype,
            device=prepared.device_map.get(rank),
            threads=threads if settings.threads or settings.workers else None,
            verifies=load.verifies,
            cache_tokens=load.cache_tokens,
            batch_size=load.batch_size,
            speed=load.speed,
            heartbeat_timeout_seconds=settings.patience.heartbeat_seconds,
            traces=settings.traces,
        )

    return Team(
        identity=identity_of(prepared.source),
        job=job,
        names=stage_names(prepared.source.stages),
        patience=settings.patience,
        progress=progress,
        num_restarts=settings.num_restarts,
    )


def _take_workers(team: Team, workers: LocalWorkers) -> None:
    for rank in range(1, len(team.names)):
        team.adopt(rank, *workers.take(rank))


def _listen(team: Team, settings: ProcessSettings) -> None:
    assert settings.listen is not None
    listener, address = listen(settings.listen)
    team.acceptor = Acceptor(listener, key=settings.key, admit=team.admit, warn=settings.note)
    settings.note(f"listening on {address} for {len(team.names) - 1} workers")
