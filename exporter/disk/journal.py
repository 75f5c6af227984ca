"""What a staging folder has finished: one line per whole file, so that a second run need not write it again."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from exporter.disk.syscalls import naming, sync_file, write_all
from plans.errors import LlamaplanError
from plans.profile import Count, Sha256
from plans.reading.strict import StrictModel, validate_json

JOURNAL_NAME = "journal"
_MAX_BYTES = 16 << 20


class Record(StrictModel):
    """A finished file (or a file that was only hashed)."""

    key: Sha256
    """Hash over everything the content depends on; records of another job are worthless."""
    name: str
    size: Count
    sha256: str
    xxh3_128: str = ""
    squares: dict[str, tuple[float, float]] | None = None
    """Of the modules that were packed into it, as the manifest will need them."""


@dataclass(slots=True)
class Journal:
    """Append-only records of one job in a staging folder."""

    fd: int
    key: str
    records: dict[str, Record] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder_fd: int, *, key: str) -> Self:
        """Open or create the journal; records of other jobs and torn lines are dropped."""
        with naming("open", JOURNAL_NAME):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(JOURNAL_NAME, flags, 0o600, dir_fd=folder_fd)
        journal = cls(fd, key)
        for line in os.pread(fd, _MAX_BYTES, 0).split(b"\n"):
            record = _parse(line)
            if record is not None and record.key == key:
                journal.records[record.name] = record
        # A torn last line must not swallow the next record.
        write_all(fd, b"\n", shown=JOURNAL_NAME)
        return journal

    def add(
        self,
        name: str,
        *,
        size: int,
        sha256: str,
        xxh3_128: str = "",
        squares: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Record a finished file; the file itself must be on disk already."""
        record = Record(
            key=self.key,
            name=name,
            size=size,
            sha256=sha256,
            xxh3_128=xxh3_128,
            squares=None if squares is None else dict(squares),
        )
        with self._lock:
            self.records[name] = record
            write_all(self.fd, record.model_dump_json().encode() + b"\n", shown=JOURNAL_NAME)
            sync_file(self.fd, shown=JOURNAL_NAME)

    def close(self) -> None:
        """Close the journal's descriptor."""
        os.close(self.fd)


def _parse(line: bytes) -> Record | None:
    if not line.strip():
        return None
    try:
        return validate_json(Record, line, where=JOURNAL_NAME)
    except LlamaplanError:
        return None
