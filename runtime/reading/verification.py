"""Checksums of an export's weights, computed in threads while the model is being loaded."""

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from plans.export.opening import Export, check_fast
from runtime.reading.opening import Source

MAX_THREADS = 4


class Verification:
    """Compares every stage's bytes with the export's fast checksums; nothing to compare for a plain checkpoint.

    Leaving the block with an error of loading reports damage instead, if there is any: it is the likelier cause.
    The threads never keep the process alive, so that an interrupt ends it at once.

    Example:
        >>> with Verification(None) as verification:
        ...     verification.wait()
    """

    def __init__(self, source: Source | None) -> None:
        self._export: Export | None = None if source is None else source.export
        self._waiting = sorted(self._export.bundles) if self._export else []
        self._num_bundles = len(self._waiting)
        self._num_checked = 0
        self._damage: Exception | None = None
        self._lock = threading.Lock()
        count = min(self._num_bundles, MAX_THREADS, os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._check_next, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.wait()

    def wait(self, progress: Callable[[str], None] = lambda _text: None) -> None:
        """Wait until everything has been compared.

        Raises:
            IntegrityError: a bundle is damaged.
            MachineError: a file cannot be read.
        """
        for thread in self._threads:
            while thread.is_alive():
                progress(f"checking the bundles ({self._num_checked} of {self._num_bundles})")
                thread.join(timeout=0.1)
        if self._damage is not None:
            raise self._damage

    def _check_next(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._damage is not None:
                    return
                stage = self._waiting.pop(0)
            assert self._export is not None
            try:
                check_fast(self._export, stage=stage)
            except Exception as error:
                self._damage = error
                return
            with self._lock:
                self._num_checked += 1
