"""Who owns a staging folder: the process is written into the folder's name, so there is never one without an owner."""

import fcntl
import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

PREFIX = ".llamaplan-"
_NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{12})-([0-9a-f]{8})-(\d{1,10})-([0-9a-f]{12})-([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process behind a staging folder."""

    target: str
    """Hash of the target's name."""
    host: str
    pid: int
    mark: str
    """Hash over boot and start time: tells a process from a later one with the same pid."""

    @classmethod
    def this_process(cls, target_name: str) -> "Owner":
        """Return the owner that a staging folder of ours has."""
        return cls(_short(os.fsencode(target_name), 12), _host(), os.getpid(), process_mark(os.getpid()) or "0" * 12)

    @classmethod
    def of(cls, name: str) -> "Owner | None":
        """Read a folder's name; None if it is no staging folder."""
        match = _NAME.fullmatch(name)
        return cls(match[1], match[2], int(match[3]), match[4]) if match else None

    def new_name(self) -> str:
        """Return a fresh folder name."""
        return f"{PREFIX}{self.target}-{self.host}-{self.pid}-{self.mark}-{os.urandom(4).hex()}"

    @property
    def is_dead(self) -> bool:
        """Whether the owner is surely gone; a process of another host never is."""
        return self.host == _host() and process_mark(self.pid) != self.mark


def process_mark(pid: int) -> str | None:
    """Return a hash that identifies a running process, or None if there is none with this pid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        # The command name, in parentheses, may hold anything; the start time is the 20th field after it.
        started = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return _portable_mark(pid)
    return _short(boot + started, 12)


def _portable_mark(pid: int) -> str | None:
    import psutil

    try:
        return _short(str(psutil.Process(pid).create_time()).encode(), 12)
    except psutil.Error:
        return None


def try_lock(folder_fd: int) -> bool:
    """Lock a staging folder until this process ends; False if another process holds it.

    It backs up the name where pids mislead (containers that share a folder). Without lock support: True.
    """
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    return _short(socket.gethostname().encode(), 8)


def _short(data: bytes, length: int) -> str:
    return hashlib.sha256(data).hexdigest()[:length]
