"""The user's cache folder of this program: kernels, choices and what was measured on this machine; private."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from plans.errors import LlamaplanError
from plans.reading.files import write_text
from plans.reading.strict import StrictModel

MAX_FILE_BYTES = 1 << 20

Kept = TypeVar("Kept", bound=StrictModel)


def cache_folder() -> Path:
    """Return the folder: nobody else may write to it, since what lies in it is trusted, kernels even run.

    Raises:
        OSError: it cannot be made, or others could write to it.
        RuntimeError: there is no home.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "llamaplan"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to or can be written by someone else")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def is_private_file(path: Path) -> bool:
    """Whether `path` is a regular file of this user that nobody else can change."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def recall(kind: type[Kept], name: str) -> Kept | None:
    """Return what was kept under a name; None where there is nothing, or nothing that is whole and this user's own."""
    try:
        path = cache_folder() / name
        return kind.read(path, max_bytes=MAX_FILE_BYTES) if is_private_file(path) else None
    except (LlamaplanError, OSError, RuntimeError):
        return None


def keep(name: str, value: StrictModel) -> bool:
    """Keep a document under a name, whole or not at all; return whether that was possible."""
    with suppress(LlamaplanError, OSError, RuntimeError):
        path = cache_folder() / name
        write_text(path, value.to_json())
        path.chmod(0o600)
        return True
    return False
