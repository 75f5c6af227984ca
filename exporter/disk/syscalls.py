"""System calls of the writing side, each failing with an error that names the call and the path."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from plans.errors import MachineError

_RENAME_EXCHANGE = 2
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EROFS}


@contextlib.contextmanager
def naming(call: str, path: object) -> Iterator[None]:
    """Turn an OSError of the body into a `MachineError` that names `call` and `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise MachineError(
            f"{call} failed: {error.strerror or error} (errno {error.errno})",
            where=path,
            hint="nothing was changed; free some space or choose another place" if full else "nothing was changed",
            code="E-SPACE" if full else "E-WRITE",
        ) from None


def open_folder(path: Path | str, *, dir_fd: int | None = None, shown: object = "") -> int:
    """Return a descriptor of a folder; not through a final symbolic link when relative to `dir_fd`."""
    nofollow = os.O_NOFOLLOW if dir_fd is not None else 0
    with naming("open", shown or path):
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | nofollow, dir_fd=dir_fd)


def list_folder(fd: int, *, shown: object) -> list[str]:
    """Return the sorted names in an open folder."""
    with naming("read", shown), os.scandir(fd) as entries:
        return sorted(entry.name for entry in entries)


def remove_file(name: str, *, dir_fd: int, shown: object) -> None:
    """Remove a file if it is there."""
    with naming("unlink", shown), contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)


def create_file(name: str, *, dir_fd: int, shown: object, reads: bool = False) -> int:
    """Create a file that must not exist yet (mode 0666 & ~umask) and return its descriptor, to write and maybe read."""
    flags = (os.O_RDWR if reads else os.O_WRONLY) | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with naming("open", shown):
        return os.open(name, flags, 0o666, dir_fd=dir_fd)


def write_all(fd: int, data: bytes | memoryview, *, shown: object) -> None:
    """Write every byte of `data`."""
    view = memoryview(data)
    with naming("write", shown):
        while view:
            view = view[os.write(fd, view) :]


def start_writeback(fd: int, *, offset: int, size: int) -> None:
    """Ask the kernel to begin writing a range to disk now, so that fsync has little left to wait for."""
    with contextlib.suppress(OSError, AttributeError):
        # On dirty pages DONTNEED starts the write; only pages that are already clean are dropped.
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def sync_file(fd: int, *, shown: object) -> None:
    """Flush a file to disk."""
    with naming("fsync", shown):
        os.fsync(fd)


def sync_folder(fd: int, *, shown: object) -> None:
    """Flush a folder's entries to disk; some filesystems cannot and say so with EINVAL, which is not an error."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            with naming("fsync", shown):
                raise


def exchange(source: str, target: str, *, source_fd: int, target_fd: int) -> bool:
    """Swap two names atomically; False if this kernel or filesystem cannot.

    Raises:
        OSError: the swap was refused for another reason.
    """
    call = _renameat2()
    if call is None:
        return False
    if call(source_fd, os.fsencode(source), target_fd, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number))


@cache
def _renameat2() -> "ctypes._FuncPointer | None":
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return call
