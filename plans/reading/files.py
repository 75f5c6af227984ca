"""Open untrusted files: plain names only, regular files only, never blocking, never more than a cap."""

import errno
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plans.errors import InputError, MachineError, printable

MAX_NAME_BYTES = 255


def check_basename(name: str, *, where: object) -> str:
    """Return `name` if it is a plain file name that means the same on every filesystem.

    Raises:
        InputError: for separators, ``..``, control characters, trailing dots or spaces, overlong names and names
            that are not in Unicode normal form C.
    """
    is_plain = (
        bool(name)
        and name not in {".", ".."}
        and not any(c in "/\\:" or not c.isprintable() for c in name)
        and name[-1] not in ". "
        and name[0] not in " -"
        and unicodedata.normalize("NFC", name) == name
    )
    if not is_plain or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise InputError(
            f"'{printable(name)}' is not a safe file name",
            where=where,
            expected=f"a plain file name of at most {MAX_NAME_BYTES} bytes without path separators",
            code="E-NAME",
        )
    return name


def typed_path(text: str) -> Path:
    """Return the path a person typed, ``~`` replaced as a shell does it: a home that nobody has stays as it is."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user, or no name at all
        return Path(text)


def explain_os_error(error: OSError, path: object) -> InputError | MachineError:
    """Turn an operating-system error on `path` into ours: missing is bad input, the rest is the machine."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError("no such file", where=path, code="E-MISSING")
    if error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
        return InputError(f"is no usable path: {os.strerror(error.errno)}", where=path, code="E-MISSING")
    return MachineError(f"cannot read: {error.strerror or error} (errno {error.errno})", where=path, code="E-READ")


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open `path` for reading and yield its descriptor; refuse FIFOs, devices and folders without blocking.

    Raises:
        InputError: missing, or not a regular file.
        MachineError: not readable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise (
            explain_os_error(error, path)
            if isinstance(error, OSError)
            else InputError("the path holds a NUL character", where=path)
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputError("not a regular file", where=path, code="E-MISSING")
        yield fd
    finally:
        os.close(fd)


def read_exactly(fd: int, *, size: int, offset: int, where: object) -> bytes:
    """Read `size` bytes at `offset` with pread, so that a truncated file is an error and never a crash."""
    parts: list[bytes] = []
    remaining = size
    while remaining:
        try:
            part = os.pread(fd, min(remaining, 1 << 24), offset)
        except OSError as error:
            raise MachineError(
                f"read error at byte {offset}: {error.strerror} (errno {error.errno})",
                where=where,
                code="E-READ",
            ) from None
        if not part:
            raise InputError(f"the file ends at byte {offset}, {remaining} bytes early", where=where, code="E-SHORT")
        parts.append(part)
        offset += len(part)
        remaining -= len(part)
    return b"".join(parts)


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file of at most `max_bytes`; the size is checked before anything is read.

    Raises:
        InputError: missing, not a regular file, or larger than the cap.
        MachineError: not readable.
    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise InputError(
                f"the file has {size} bytes",
                where=path,
                expected=f"at most {max_bytes} bytes",
                code="E-TOO-LARGE",
            )
        return read_exactly(fd, size=size, offset=0, where=path)


def sha256_hex(data: bytes) -> str:
    """Return the lower-case hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there completely or, on any failure, as it was before.

    Raises:
        MachineError: the folder is missing or not writable, the disk is full, or `path` is a folder.
    """
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)  # noqa: PTH105 - the name of the call is the point
    except (OSError, ValueError) as error:
        reason = f"{error.strerror or error} (errno {error.errno})" if isinstance(error, OSError) else str(error)
        raise MachineError(f"cannot write: {reason}", where=path, code="E-WRITE") from None
    finally:
        with suppress(OSError, ValueError):
            beside.unlink(missing_ok=True)
