"""The background threads of one export: they hash, and wait for the disk, while the calling thread copies."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workers:
    """One thread each, so that what is given to one pool happens in order."""

    digest: ThreadPoolExecutor
    """Hashes what is written."""
    source: ThreadPoolExecutor
    """Hashes the checkpoint's shards."""
    sync: ThreadPoolExecutor
    """Flushes finished files to disk."""
    stop: threading.Event
    """Set when the export is over, well or not."""


@contextmanager
def start_workers() -> Iterator[Workers]:
    """Start the threads; on leaving they are told to stop and waited for."""
    digest, source, sync = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("digest", "source", "sync"))
    workers = Workers(digest, source, sync, threading.Event())
    try:
        yield workers
    finally:
        workers.stop.set()
        digest.shutdown(cancel_futures=True)
        source.shutdown(cancel_futures=True)
        sync.shutdown()  # every flush owns a descriptor, which it closes even when told to stop
