"""The results of `llamarun batch`: appended as they come, safe against a kill at any moment, in input order at the end.

Each line says which request it answers (`index`, `request_sha256`), so the file alone is enough to go on: complete
lines are kept, a torn last line is dropped, and what is missing runs. Once nothing is missing the lines are put into
the order of the input, by one atomic replacement.
"""

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from plans.errors import InputError, IntegrityError, MachineError
from plans.reading.files import read_exactly, write_text
from plans.reading.strict import parse_json

RETRIES = 3


class ResultFile:
    """The open output file; one process at a time.

    Args:
        path: the file; created if it is missing.
        expected: `request_sha256` of every line of the input, by index.

    Raises:
        InputError: the file holds something else.
        IntegrityError: its results belong to another input, other settings, or another model.
        MachineError: it cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, *, expected: Sequence[str]) -> None:
        self.path = path
        self._expected = expected
        self._fd = -1
        self._lines: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        self._fd = _open_locked(self.path)
        try:
            self._recover()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def done(self) -> frozenset[int]:
        """Indices that have a result."""
        return frozenset(self._lines)

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Add results and wait until they are on the disk; on failure none of them is in the file."""
        lines = {result["index"]: _line(result) for result in results}
        before = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, b"".join(lines.values()))
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, before)
            raise _explain(error, self.path) from None
        self._lines |= lines

    def finish(self) -> None:
        """Put the lines into the order of the input, if they are not."""
        indices = list(self._lines)
        if indices != sorted(indices):
            write_text(self.path, b"".join(self._lines[index] for index in sorted(indices)).decode())

    def _recover(self) -> None:
        """Read the results that are there and drop a torn last line, and the remains of a killed `finish`."""
        data = read_exactly(self._fd, size=os.fstat(self._fd).st_size, offset=0, where=self.path)
        whole, _, torn = data.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            index = self._check(line, where=f"{self.path}:{number}")
            self._lines[index] = line + b"\n"
        if torn:
            os.ftruncate(self._fd, len(data) - len(torn))
        os.lseek(self._fd, 0, os.SEEK_END)
        remains = re.compile(re.escape(f".{self.path.name[:200]}.") + r"[0-9]+\.tmp")
        for path in self.path.parent.iterdir():
            if remains.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _check(self, line: bytes, *, where: str) -> int:
        result = parse_json(line, where=where)
        index = result.get("index") if isinstance(result, dict) else None
        if type(index) is not int or "request_sha256" not in result:
            raise InputError(
                "is no result of a batch", where=where, hint="write to another file with -o", code="E-BATCH"
            )
        if index in self._lines:
            raise InputError(f"a second result for line {index} of the input", where=where, code="E-BATCH")
        if not 0 <= index < len(self._expected) or result["request_sha256"] != self._expected[index]:
            raise IntegrityError(
                f"the result of line {index} belongs to another input, other settings or another model",
                where=where,
                hint="write to another file with -o, or remove this one",
                code="E-RESUME",
            )
        return index


def _line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _open_locked(path: Path) -> int:
    """Open the file and lock it, making sure that nobody replaced it in between."""
    for _ in range(RETRIES):
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            break
        except FileNotFoundError:
            pass
        os.close(fd)
    raise MachineError(
        "another process is writing it", where=path, hint="wait for it, or use another -o", code="E-BUSY"
    )


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        raise (_explain(error, path) if isinstance(error, OSError) else InputError(str(error), where="-o")) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("is not a regular file", where=path, hint="write to another file with -o", code="E-BATCH")
    return fd


def _explain(error: OSError, path: Path) -> MachineError:
    hint = "free some space and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return MachineError(
        f"cannot write: {error.strerror or error} (errno {error.errno})", where=path, hint=hint, code="E-WRITE"
    )
