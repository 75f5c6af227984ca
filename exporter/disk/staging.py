"""All or nothing: an export is built in a hidden folder beside its target and appears there by one rename.

Killed at any point, the target is absent or complete. What a killed run left behind is taken over by the next run to
the same target, which keeps the files that are whole. The rename decides between two exports to one target.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from exporter.binding import Say
from exporter.disk.journal import Journal, Record
from exporter.disk.owner import Owner, try_lock
from exporter.disk.syscalls import (
    create_file,
    exchange,
    list_folder,
    naming,
    open_folder,
    remove_file,
    sync_file,
    sync_folder,
    write_all,
)
from exporter.disk.target import Target
from plans.errors import MachineError
from plans.reading.digest import FileDigest, RunningDigest, scan

FILES = "files"
OLD = "old"
PREVIOUS = "previous"
SCRATCH = "scratch"


@dataclass(slots=True)
class Staging:
    """The hidden folder of one running export. A context manager: leaving it removes whatever was not published."""

    target: Target
    name: str
    folder_fd: int
    files_fd: int
    journal: Journal
    warn: Say

    @classmethod
    def begin(cls, target: Target, *, key: str, force: bool, warn: Say) -> Self:
        """Create the staging folder, or take over what a dead run to the same target left.

        Args:
            target: where the export will be.
            key: hash over everything the files depend on; finished files of another key are dropped.
            force: whether something that is at the target may be replaced.
            warn: told about staging folders that belong to others.

        Raises:
            MachineError: the target is taken, or the parent folder cannot be written.
        """
        owner = Owner.this_process(target.name)
        name = _take_over(target, owner, warn=warn)
        try:
            if name is not None:
                _restore_old(target, name)
            target.check_free(force=force)
            name = name or _create(target, owner)
            return cls._open(target, name, key=key, warn=warn)
        except BaseException:
            if name is not None:
                _remove(name, dir_fd=target.parent_fd)
            raise

    @classmethod
    def _open(cls, target: Target, name: str, *, key: str, warn: Say) -> Self:
        folder_fd = open_folder(name, dir_fd=target.parent_fd, shown=target.parent / name)
        try_lock(folder_fd)
        journal = Journal.open(folder_fd, key=key)
        shown = target.parent / name / FILES
        _begin_files(folder_fd, kept=journal.records, shown=shown)
        files_fd = open_folder(FILES, dir_fd=folder_fd, shown=shown)
        return cls(target, name, folder_fd, files_fd, journal, warn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.journal.close()
        os.close(self.files_fd)
        os.close(self.folder_fd)
        if not _remove(self.name, dir_fd=self.target.parent_fd):
            self.warn(f"{self.target.parent / self.name} could not be removed completely; remove it by hand")

    def shown(self, name: str) -> str:
        """Return the path of a staged file as error messages show it."""
        return str(self.target.parent / self.name / FILES / name)

    def whole(self, name: str, *, size: int) -> Record | None:
        """Return the record of a file that an earlier run finished and that still has every byte; else remove it."""
        record = self.journal.records.get(name)
        if record is not None and record.size == size and self._is_intact(name, record):
            return record
        remove_file(name, dir_fd=self.files_fd, shown=self.shown(name))
        return None

    def create(self, name: str) -> int:
        """Create a file and return its descriptor."""
        return create_file(name, dir_fd=self.files_fd, shown=self.shown(name))

    def scratch(self) -> int:
        """Return the descriptor of an empty file without a name, to be written and read back; it goes when closed."""
        shown = self.target.parent / self.name / SCRATCH
        remove_file(SCRATCH, dir_fd=self.folder_fd, shown=shown)
        fd = create_file(SCRATCH, dir_fd=self.folder_fd, shown=shown, reads=True)
        remove_file(SCRATCH, dir_fd=self.folder_fd, shown=shown)
        return fd

    def write(self, name: str, data: bytes) -> FileDigest:
        """Write a small file, flush it to disk and return its digest."""
        remove_file(name, dir_fd=self.files_fd, shown=self.shown(name))
        fd = self.create(name)
        try:
            write_all(fd, data, shown=self.shown(name))
            sync_file(fd, shown=self.shown(name))
        finally:
            os.close(fd)
        digest = RunningDigest()
        digest.update(data)
        return digest.result()

    def keep_only(self, names: set[str]) -> None:
        """Remove staged files that are not part of this export."""
        for name in set(list_folder(self.files_fd, shown=self.shown(""))) - names:
            remove_file(name, dir_fd=self.files_fd, shown=self.shown(name))

    def publish(self, *, force: bool) -> None:
        """Make the finished folder appear at the target, whole.

        Raises:
            MachineError: the target appeared meanwhile, the parent was moved, or a call failed; nothing was changed.
        """
        sync_folder(self.files_fd, shown=self.shown(""))
        self.target.check_parent()
        found = self.target.check_free(force=force)
        if found in {"nothing", "empty folder"}:
            self._move_in()
        else:
            self._swap_in()
        try:
            sync_folder(self.target.parent_fd, shown=self.target.parent)
        except MachineError as error:
            self.warn(f"the export is complete, but may not survive a power cut now: {error.what}")

    def _move_in(self) -> None:
        try:
            os.rename(FILES, self.target.name, src_dir_fd=self.folder_fd, dst_dir_fd=self.target.parent_fd)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise MachineError(
                    "something appeared there meanwhile, perhaps another export; it was left alone",
                    where=self.target.path,
                    code="E-EXISTS",
                ) from None
            with naming("rename", self.target.path):
                raise

    def _swap_in(self) -> None:
        """Replace what is at the target; the old content lies in the staging folder until it is removed with it."""
        with naming("rename", self.target.path):
            if exchange(FILES, self.target.name, source_fd=self.folder_fd, target_fd=self.target.parent_fd):
                return
            os.rename(self.target.name, OLD, src_dir_fd=self.target.parent_fd, dst_dir_fd=self.folder_fd)
            try:
                os.rename(FILES, self.target.name, src_dir_fd=self.folder_fd, dst_dir_fd=self.target.parent_fd)
            except BaseException:
                os.rename(OLD, self.target.name, src_dir_fd=self.folder_fd, dst_dir_fd=self.target.parent_fd)
                raise

    def _is_intact(self, name: str, record: Record) -> bool:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.files_fd)
        except OSError:
            return False
        running = xxhash.xxh3_128()
        try:
            size = scan(fd, take=running.update, where=self.shown(name))
        finally:
            os.close(fd)
        return size == record.size and running.hexdigest() == record.xxh3_128


def _begin_files(folder_fd: int, *, kept: Iterable[str], shown: Path) -> None:
    """Make the folder that will be published, and move into it the finished files of a run that was taken over.

    The folder that run had is not used itself: it may be one that was just replaced, with a mode and files of its own.
    """
    _remove(PREVIOUS, dir_fd=folder_fd)
    with naming("rename", shown), contextlib.suppress(FileNotFoundError):
        os.rename(FILES, PREVIOUS, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    with naming("mkdir", shown):
        os.mkdir(FILES, dir_fd=folder_fd)  # mode 0777 & ~umask, as any folder a person makes
    for name in kept:
        if "/" not in name:
            with contextlib.suppress(OSError):  # whatever is not there is written again
                os.rename(f"{PREVIOUS}/{name}", f"{FILES}/{name}", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    _remove(PREVIOUS, dir_fd=folder_fd)


def _create(target: Target, owner: Owner) -> str:
    name = owner.new_name()
    with naming("mkdir", target.parent / name):
        os.mkdir(name, 0o700, dir_fd=target.parent_fd)
    return name


def _take_over(target: Target, owner: Owner, *, warn: Say) -> str | None:
    """Rename one dead run's folder to ours and remove the others; the rename decides who gets it."""
    taken = None
    for name in list_folder(target.parent_fd, shown=target.parent):
        other = Owner.of(name)
        if other is None or other.target != owner.target:
            continue
        if not (other.is_dead and _is_unlocked(name, target)):
            warn(f"{target.parent / name} belongs to process {other.pid}, which may still be exporting; left alone")
            continue
        claimed = owner.new_name()
        try:
            os.rename(name, claimed, src_dir_fd=target.parent_fd, dst_dir_fd=target.parent_fd)
        except OSError:
            continue  # another run was faster
        if taken is None:
            taken = claimed
        else:
            _remove(claimed, dir_fd=target.parent_fd)
    return taken


def _is_unlocked(name: str, target: Target) -> bool:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target.parent_fd)
    except OSError:
        return False
    try:
        return try_lock(fd)
    finally:
        os.close(fd)


def _restore_old(target: Target, name: str) -> None:
    """Put back what a run was replacing when it was killed between two renames (only without atomic exchange)."""
    if target.look() == "nothing":
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{name}/{OLD}", target.name, src_dir_fd=target.parent_fd, dst_dir_fd=target.parent_fd)


def _remove(name: str, *, dir_fd: int) -> bool:
    """Remove a folder and say whether it is gone; another process may be quicker."""
    with contextlib.suppress(OSError):
        shutil.rmtree(name, dir_fd=dir_fd)
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False
