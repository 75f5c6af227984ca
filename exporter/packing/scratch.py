"""Bytes put aside until their place in a stage's file comes: a file without a name, which vanishes with its process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from exporter.disk.staging import Staging
from exporter.disk.syscalls import naming, write_all
from plans.reading.digest import read_into

_SHOWN = "what is put aside beside the export"


@dataclass(slots=True)
class Scratch:
    """Runs of bytes by name; what is added to one name is added without another in between."""

    fd: int
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name -> offset and size."""
    end: int = 0

    @classmethod
    @contextmanager
    def of(cls, staging: Staging) -> "Iterator[Scratch]":
        """Open one on the filesystem of the export; errors as any other write."""
        fd = staging.scratch()
        try:
            yield cls(fd)
        finally:
            os.close(fd)

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Append to what is put aside under `name`."""
        offset, size = self.places.get(name, (self.end, 0))
        assert offset + size == self.end
        write_all(self.fd, data, shown=_SHOWN)
        self.places[name] = offset, size + len(data)
        self.end += len(data)

    def size(self, name: str) -> int:
        """Bytes put aside under `name`."""
        return self.places[name][1]

    def read(self, name: str, *, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` within what is put aside under `name`."""
        count = read_into(self.fd, buffer, offset=self.places[name][0] + offset, where=_SHOWN)
        assert count == len(buffer)

    def clear(self) -> None:
        """Forget everything and give the space back."""
        with naming("ftruncate", _SHOWN):
            os.ftruncate(self.fd, 0)
            os.lseek(self.fd, 0, os.SEEK_SET)
        self.places.clear()
        self.end = 0
