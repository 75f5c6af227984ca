"""Real jobs of several processes for the tests of failures: start them, look at them, hurt them."""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import psutil

T = TypeVar("T")
PROMPT = "def __init__(self, "
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = 64
"""Bytes that a held job may write; more than the text of any token."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}


@dataclass(slots=True)
class Job:
    """A driver and its local workers."""

    process: subprocess.Popen[bytes]
    is_held: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> dict[int, int]:
        """Rank -> pid of the workers that run now."""
        found = {}
        for child in psutil.Process(self.pid).children():
            words = child.cmdline()
            if "runtime.worker" in words:
                found[int(words[words.index("--rank") + 1])] = child.pid
        return found

    def rank(self, number: int) -> int:
        """The pid of a rank; waits until it is there."""
        return self.pid if number == 0 else wait_for(lambda: self.workers().get(number))

    def first_text(self) -> bytes:
        """Wait for the first byte of text. A held job writes a few tokens more, and waits."""
        assert self.process.stdout is not None
        if self.is_held:
            self.process.stdout.read(1)
        return self.process.stdout.read(1)

    def let_go(self) -> bytes:
        """Read what a held job has written by now, maybe nothing; it has room for a page then."""
        assert self.process.stdout is not None
        has_text = select.select([self.process.stdout], [], [], 0)[0]
        return self.process.stdout.read(PAGE) if has_text else b""

    def end(self, *, within: float) -> tuple[int, bytes, str]:
        """Wait for the end; returns the exit code, the rest of the text and what was said."""
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err.decode()


def wait_for(look: Callable[[], T | None], *, seconds: float = 60) -> T:
    """Look until there is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = look()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            found = None
        if found:
            return found
        time.sleep(0.05)  # looking costs the processes that are looked at time, too
    raise AssertionError("waited in vain")


def almost_full_pipe() -> tuple[IO[bytes], int]:
    """Return both ends of a pipe that takes `ROOM` bytes more. One byte that counts for nothing comes before them.

    Whoever writes more than that waits until it is read, however long a busy machine keeps the reader from reading.
    """
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    os.write(writer, bytes(PAGE - ROOM))
    os.read(reader, PAGE - ROOM - 1)
    return os.fdopen(reader, "rb", buffering=0), writer


@contextmanager
def started(
    *arguments: object, module: str = "runtime.cli", host: str | None = None, is_held: bool = False
) -> Iterator[Job]:
    """Start a command, in a network namespace if one is named; nothing of it is left afterwards.

    A held one cannot end before its text is read: what is done to it after `first_text` comes in time on any machine.
    """
    where = ["ip", "netns", "exec", host] if host else []
    command = [*where, sys.executable, "-m", module, *map(str, arguments)]
    reader, writer = almost_full_pipe() if is_held else (None, subprocess.PIPE)
    process = subprocess.Popen(
        command,
        bufsize=0,
        stdout=writer,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    if reader is not None:
        os.close(writer)
        process.stdout = reader
    job = Job(process, is_held)
    known: set[int] = set()
    try:
        yield job
    finally:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending just now
                known |= set(job.workers().values())
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()
        assert not [pid for pid in known if is_alive(pid)] or wait_for(lambda: not any(map(is_alive, known)), seconds=5)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def has_loaded_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def is_connected(pid: int) -> bool:
    """Whether a process has data connections."""
    return any(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections("inet"))


def generate(folder: Path, *options: object, tokens: int = 900) -> Sequence[object]:
    """The arguments of a run that takes a while."""
    return ["generate", folder, "--processes", "--threads", 1, "-p", PROMPT, "-n", tokens, "--ignore-eos", *options]
