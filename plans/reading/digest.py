"""Checksums of files, read with pread in bounded buffers: a file that shrinks is an error, never a crash."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from plans.errors import IntegrityError, MachineError
from plans.reading.files import open_regular

BUFFER_BYTES = 2 << 20
"""What is written from whole buffers of this size is cached in huge pages, where the file system can: a step then reads
the weights up to half again as fast. (A virtual machine may have to fetch such pages from its host, 2 s per GB.)"""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and checksums of one file."""

    size: int
    sha256: str
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is replaced, rewritten or cut: compared before and after a long read."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, source: int | Path) -> "FileState":
        """Return the state of an open descriptor or a path; OSError as `stat`."""
        status = os.fstat(source) if isinstance(source, int) else source.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class RunningDigest:
    """sha256 and xxh3_128 of a stream of buffers."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_128()
        self._size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes; both hashes release the interpreter lock for large buffers."""
        self._sha256.update(data)
        self._xxh3.update(data)
        self._size += len(data)

    def result(self) -> FileDigest:
        """Return the digest of everything taken in so far."""
        return FileDigest(self._size, self._sha256.hexdigest(), self._xxh3.hexdigest())


def read_into(fd: int, buffer: memoryview, *, offset: int, where: object) -> int:
    """Fill `buffer` from `offset` and return how many bytes there were (fewer only at the end of the file).

    Raises:
        MachineError: the device failed to read; names the offset.
    """
    filled = 0
    while filled < len(buffer):
        try:
            count = os.preadv(fd, [buffer[filled:]], offset + filled)
        except OSError as error:
            raise MachineError(
                f"read error at byte {offset + filled}: {error.strerror} (errno {error.errno})",
                where=where,
                code="E-READ",
            ) from None
        if not count:
            break
        filled += count
    return filled


def scan(fd: int, *, take: Callable[[memoryview], None], where: object) -> int:
    """Hand the whole file to `take` in buffers of 2 MiB and return its size; errors as `read_into`."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    offset = 0
    while count := read_into(fd, buffer, offset=offset, where=where):
        take(buffer[:count])
        offset += count
    return offset


def digest_file(path: Path, *, take: Callable[[memoryview], None] | None = None) -> FileDigest:
    """Return both checksums of a regular file; `take` also sees every buffer (for progress).

    Raises:
        InputError: missing, or not a regular file.
        MachineError: not readable.
    """
    running = RunningDigest()

    def both(data: memoryview) -> None:
        running.update(data)
        if take is not None:
            take(data)

    with open_regular(path) as fd:
        scan(fd, take=both, where=path)
    return running.result()


def check_xxh3(path: Path, *, expected: str) -> None:
    """Compare a file's xxh3_128 with what was recorded; reads the file once, at memory speed if it is cached.

    Raises:
        IntegrityError: the file differs from what was recorded.
        InputError, MachineError: as `digest_file`.
    """
    running = xxhash.xxh3_128()
    with open_regular(path) as fd:
        scan(fd, take=running.update, where=path)
    if running.hexdigest() != expected:
        raise IntegrityError(
            f"the content has xxh3_128 {running.hexdigest()}, the manifest says {expected}",
            where=path,
            hint="the file is damaged or belongs to another export; copy it again",
            code="E-DAMAGED",
        )
