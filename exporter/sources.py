"""The checkpoint's files while they are being read: opened on demand, hashed beside the copy, watched for change."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from exporter.foreign.made import MADE_BEGIN, MadeTensors
from exporter.foreign.origin import Origin
from plans.checkpoint.gguf import SUFFIX
from plans.checkpoint.header import read_header
from plans.checkpoint.units import Shard
from plans.errors import IntegrityError, LlamaplanError
from plans.gguf.header import read_gguf_header
from plans.reading.digest import FileState, read_into, scan
from plans.reading.files import explain_os_error

MAX_OPEN_FILES = 16


class Cancelled(Exception):  # noqa: N818 - not an error
    """The background hashing was told to stop."""


@dataclass(slots=True)
class Sources:
    """Shards of one checkpoint folder, by name; a context manager that closes what it opened."""

    directory: Path
    states: Mapping[str, FileState]
    made: MadeTensors | None = None
    """What lies in no file and is made when it is read."""
    _open: "OrderedDict[str, int]" = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, directory: Path, *, shards: Iterable[Shard], made: MadeTensors | None = None) -> Self:
        """Remember the state of every shard; errors as `check_unchanged`.

        The header is read again after the state was taken, so that layout and state belong to the same file.
        """
        shards = tuple(shards)
        sources = cls(directory, {shard.name: FileState.of(directory / shard.name) for shard in shards}, made)
        for shard in shards:
            sources._check_header(shard)
        return sources

    @classmethod
    def of_origin(cls, origin: Origin) -> Self:
        """Remember the files of what is exported; errors as `check_unchanged`."""
        return cls.of(origin.directory, shards=origin.checkpoint.shards, made=origin.made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, name: str, *, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from shard `name`.

        Raises:
            IntegrityError: the file was replaced, deleted or cut since the export began.
            MachineError: the device failed to read; names file and offset.
        """
        if offset >= MADE_BEGIN and self.made is not None:
            self.made.fill(self._read_stored, buffer=buffer, offset=offset)
        else:
            self._read_stored(name, buffer, offset)

    def check_unchanged(self, *, shards: Iterable[Shard]) -> None:
        """Compare every shard with its state at the beginning.

        Raises:
            IntegrityError: a shard was changed, replaced or deleted meanwhile.
        """
        for shard in shards:
            try:
                state = FileState.of(self.directory / shard.name)
            except OSError as error:
                raise self._changed(shard.name, f"cannot be found any more (errno {error.errno})") from None
            self._compare(shard.name, state)
            self._check_header(shard)

    def sha256(self, name: str, *, stop: threading.Event) -> str:
        """Return the sha256 of a whole shard, read through a descriptor of its own.

        Raises:
            IntegrityError: as `check_unchanged`.
            Cancelled: `stop` was set.
        """
        digest = hashlib.sha256()

        def take(data: memoryview) -> None:
            if stop.is_set():
                raise Cancelled
            digest.update(data)

        fd = self._open_checked(name)
        try:
            size = scan(fd, take=take, where=self.directory / name)
        finally:
            os.close(fd)
        if size != self.states[name].size:
            raise self._changed(name, f"ends at byte {size}")
        return digest.hexdigest()

    def _read_stored(self, name: str, buffer: memoryview, offset: int) -> None:
        count = read_into(self._descriptor(name), buffer, offset=offset, where=self.directory / name)
        if count != len(buffer):
            raise self._changed(name, f"ends at byte {offset + count}")

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = self._open_checked(name)
        return self._open[name]

    def _open_checked(self, name: str) -> int:
        try:
            fd = os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._changed(name, "cannot be found any more") from None
        except OSError as error:
            raise explain_os_error(error, self.directory / name) from None
        try:
            self._compare(name, FileState.of(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _compare(self, name: str, state: FileState) -> None:
        if state != self.states[name]:
            raise self._changed(name, f"had {self.states[name].size} bytes and now has {state.size}")

    def _check_header(self, shard: Shard) -> None:
        try:
            found = _header_sha256(self.directory / shard.name)
        except LlamaplanError as error:
            raise self._changed(shard.name, error.what) from None
        if found != shard.header.header_sha256:
            raise self._changed(shard.name, f"its header hashes to {found}, before {shard.header.header_sha256}")

    def _changed(self, name: str, how: str) -> IntegrityError:
        return IntegrityError(
            f"was changed during the export: {how}",
            where=self.directory / name,
            hint="leave the checkpoint alone and export again",
            code="E-CHANGED",
        )


def _header_sha256(path: Path) -> str:
    return read_gguf_header(path).header_sha256 if path.suffix == SUFFIX else read_header(path).header_sha256
