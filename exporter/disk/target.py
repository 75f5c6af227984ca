"""The folder to be written: where it is, what is there now, and whether it may be replaced.

Everything happens relative to a descriptor of the parent folder, so that a path swapped meanwhile changes nothing.
"""

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from exporter.disk.syscalls import list_folder, open_folder
from plans.errors import InputError, MachineError, UsageError
from plans.export.manifest import MANIFEST_NAME
from plans.reading.files import MAX_NAME_BYTES
from plans.reading.sizes import format_bytes

Found = Literal["nothing", "empty folder", "an export", "other files", "a file", "a symbolic link", "a mount point"]


@dataclass(slots=True)
class Target:
    """An output folder: its parent as an open descriptor, and its name there. A context manager."""

    parent: Path
    name: str
    parent_fd: int

    @classmethod
    def open(cls, output: Path, *, sources: Iterable[Path]) -> Self:
        """Open the parent of `output`.

        Args:
            output: the folder to write; its parent must exist.
            sources: folders and files that are read; the output may not touch them.

        Raises:
            UsageError: the output is, holds or lies in a source, or is no usable name.
            MachineError: the parent is missing or cannot be opened.
        """
        try:
            parent, name = _split(output)
            resolved = [source.resolve() for source in sources]
            has_parent = parent.is_dir()
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"not a usable path: {error}", where=output) from None
        for source in resolved:
            _refuse_overlap(parent / name, source, shown=output)
        if not has_parent:
            raise MachineError(
                "the parent folder does not exist", where=output, hint=f"create {parent} first", code="E-PARENT"
            )
        return cls(parent, name, open_folder(parent))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self.parent_fd)

    @property
    def path(self) -> Path:
        """The folder's full path."""
        return self.parent / self.name

    def look(self) -> Found:
        """Say what is at the target now, without following a link."""
        try:
            status = os.stat(self.name, dir_fd=self.parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return "nothing"
        except OSError as error:
            raise MachineError(f"stat failed: {error.strerror} (errno {error.errno})", where=self.path) from None
        if stat.S_ISLNK(status.st_mode):
            return "a symbolic link"
        if not stat.S_ISDIR(status.st_mode):
            return "a file"
        if status.st_dev != os.fstat(self.parent_fd).st_dev or os.path.ismount(self.path):
            return "a mount point"
        names = self._names()
        return "an export" if MANIFEST_NAME in names else "other files" if names else "empty folder"

    def check_free(self, *, force: bool) -> Found:
        """Refuse what may not be replaced and return what is there.

        Raises:
            MachineError: something is there and `force` is not given, or it cannot be replaced at all.
        """
        found = self.look()
        if found in {"nothing", "empty folder"}:
            return found
        if found in {"a symbolic link", "a mount point"}:
            raise MachineError(
                f"is {found}", where=self.path, hint="name a folder inside or beside it", code="E-EXISTS"
            )
        if not force:
            what = f"is {found}" if found == "a file" else f"already holds {found}"
            raise MachineError(what, where=self.path, hint="choose another folder or give --force", code="E-EXISTS")
        if any(folder.is_relative_to(self.path) for folder in _cherished()):
            raise MachineError("is your home or current folder and is never replaced", where=self.path, code="E-EXISTS")
        return found

    def check_space(self, needed_bytes: int) -> None:
        """Compare what will be written with the free space of the target's filesystem.

        Raises:
            MachineError: it does not fit; states both numbers.
        """
        status = os.fstatvfs(self.parent_fd)
        free_bytes = status.f_bavail * status.f_frsize
        if status.f_blocks and needed_bytes > free_bytes:
            raise MachineError(
                f"need {needed_bytes} bytes ({format_bytes(needed_bytes)}), free {free_bytes} "
                f"({format_bytes(free_bytes)})",
                where=self.parent,
                hint="free some space or choose another place",
                code="E-SPACE",
            )

    def check_parent(self) -> None:
        """Compare the parent's path with the folder that was opened.

        Raises:
            MachineError: the path leads elsewhere now.
        """
        opened = os.fstat(self.parent_fd)
        try:
            now = self.parent.stat()
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
            raise MachineError("was moved or replaced during the export", where=self.parent, code="E-SWAPPED")

    def _names(self) -> list[str]:
        fd = open_folder(self.name, dir_fd=self.parent_fd, shown=self.path)
        try:
            return list_folder(fd, shown=self.path)
        finally:
            os.close(fd)


def _cherished() -> list[Path]:
    """The current and the home folder, as far as there are any."""
    found = []
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):
            found.append(find().resolve())
    return found


def _split(output: Path) -> tuple[Path, str]:
    if "\0" in str(output):
        raise InputError("the path holds a NUL character", where=output)
    if not output.name or output.name == "..":
        output = output.resolve()
    if not output.name:
        raise ValueError("the root folder cannot be replaced")
    if len(os.fsencode(output.name)) > MAX_NAME_BYTES:
        raise ValueError(f"the name is longer than {MAX_NAME_BYTES} bytes")
    return output.parent.resolve(), output.name


def _refuse_overlap(target: Path, source: Path, *, shown: Path) -> None:
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
        kind = "is" if target == source else "lies inside" if target.is_relative_to(source) else "contains"
        raise UsageError(f"the output {kind} the model", where=shown, hint="choose a folder beside it")
