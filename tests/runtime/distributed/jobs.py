"""Real jobs of several processes for the tests of failures: start them, look at them, hurt them."""

import contextlib
import fcntl
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar, cast

import psutil

from tests.runtime.distributed.nursery import ENVIRONMENT, Forked, the_nursery

T = TypeVar("T")
PROMPT = "def __init__(self, "
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = 64
"""Bytes that a held job may write; more than the text of any token."""
WORDS = {"runtime.cli": ["llamarun"], "runtime.worker": ["runtime.worker"]}
"""What the nursery has imported; other modules get an interpreter of their own."""


@dataclass(slots=True)
class Job:
    """A driver and its local workers."""

    process: subprocess.Popen[bytes] | Forked
    stdout: IO[bytes]
    stderr: IO[bytes]
    is_held: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> dict[int, int]:
        """Rank -> pid of the workers that run now."""
        found = {}
        for child in psutil.Process(self.pid).children():
            name, words = child.name(), child.cmdline()
            if name.startswith("llamarun "):
                found[int(name.removeprefix("llamarun "))] = child.pid
            elif "--rank" in words:  # started anew, and not yet so far that it has its name
                found[int(words[words.index("--rank") + 1])] = child.pid
        return found

    def rank(self, number: int) -> int:
        """The pid of a rank; waits until it is there."""
        return self.pid if number == 0 else wait_for(lambda: self.workers().get(number))

    def first_text(self) -> bytes:
        """Wait for the first byte of text. A held job writes a few tokens more, and waits."""
        if self.is_held:
            self.stdout.read(1)
        return self.stdout.read(1)

    def let_go(self) -> bytes:
        """Read what a held job has written by now, maybe nothing; it has room for a page then."""
        has_text = select.select([self.stdout], [], [], 0)[0]
        return self.stdout.read(PAGE) if has_text else b""

    def end(self, *, within: float) -> tuple[int, bytes, str]:
        """Wait for the end; returns the exit code, the rest of the text and what was said."""
        deadline = time.monotonic() + within
        out, err = read_all([self.stdout, self.stderr], deadline=deadline)
        return self.process.wait(timeout=max(0.0, deadline - time.monotonic())), out, err.decode()


def read_all(pipes: Sequence[IO[bytes]], *, deadline: float) -> list[bytes]:
    """Read several pipes to their ends."""
    found = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as waiting:
        for pipe in pipes:
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map():
            ready = waiting.select(deadline - time.monotonic())
            assert ready, f"still writes: {found}"
            for key, _ in ready:
                pipe = cast("IO[bytes]", key.fileobj)
                found[pipe] += (text := pipe.read(1 << 16))
                if not text:
                    waiting.unregister(pipe)
    return list(found.values())


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


def almost_full_pipe(room: int) -> tuple[IO[bytes], int]:
    """Return both ends of a pipe that takes so many bytes more. One byte that counts for nothing comes before them.

    Whoever writes more than that waits until it is read, however long a busy machine keeps the reader from reading.
    """
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    os.write(writer, bytes(PAGE - room))
    os.read(reader, PAGE - room - 1)
    return os.fdopen(reader, "rb", buffering=0), writer


@contextmanager
def started(
    *arguments: object,
    module: str = "runtime.cli",
    host: str | None = None,
    is_held: bool = False,
    room: int = ROOM,
) -> Iterator[Job]:
    """Start a command, in a network namespace if one is named; nothing of it is left afterwards.

    A held one cannot end before its text is read: what is done to it after `first_text` comes in time on any machine.
    It may write `room` bytes before.
    """
    stdout, out = almost_full_pipe(room) if is_held else any_pipe()
    stderr, err = any_pipe()
    with Path(os.devnull).open("rb") as nothing, stdout, stderr:
        try:
            process = start([*map(str, arguments)], module=module, host=host, streams=[nothing.fileno(), out, err])
        finally:
            os.close(out)
            os.close(err)
        job = Job(process, stdout, stderr, is_held)
        known: set[int] = set()
        try:
            yield job
        finally:
            if process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending just now
                    known |= set(job.workers().values())
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            assert not any(map(is_alive, known)) or wait_for(lambda: not any(map(is_alive, known)), seconds=5)


def start(
    words: Sequence[str], *, module: str, host: str | None, streams: Sequence[int]
) -> subprocess.Popen[bytes] | Forked:
    """Fork it from the nursery, or start an interpreter where the nursery cannot."""
    if module in WORDS:
        return the_nursery().fork([*WORDS[module], *words], streams=streams, host=host)
    stdin, stdout, stderr = streams
    command = [sys.executable, "-m", module, *words]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=ENVIRONMENT)


def any_pipe() -> tuple[IO[bytes], int]:
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb", buffering=0), writer


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
