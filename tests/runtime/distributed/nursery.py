"""A process that has imported everything and forks the processes of jobs, each in its network namespace.

Importing torch takes longer than what is tested. Run as a program, with one end of a pair of sockets, it takes one JSON
object per message, `command` and `host`, with the descriptors of stdin, stdout and stderr, and says `started PID` and
`ended PID CODE TIME`.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

_CLONE_NEWNET = 0x40000000
MODULES = {"llamarun": "runtime.cli", "llamaplan": "planner.cli", "runtime.worker": "runtime.worker"}
ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"}


@dataclass(slots=True)
class Forked:
    """A process of the nursery; the part of `Popen` that tests use."""

    pid: int
    has_ended: threading.Event = field(default_factory=threading.Event)
    returncode: int | None = None
    ended_at: float = 0.0
    """On the monotonic clock."""

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self.has_ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass(slots=True)
class Child:
    """A process that writes into files."""

    process: Forked
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """What it wrote to stdout."""
        return self.output.read_text()

    @property
    def said(self) -> str:
        """What it wrote to stderr."""
        return self.output.with_suffix(".err").read_text()

    def end(self, *, within: float) -> tuple[int, float]:
        """Wait for its end; returns its exit code, and when it ended on the monotonic clock."""
        try:
            return self.process.wait(timeout=within), self.process.ended_at
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs: {self.said}") from None


class Nursery:
    """Starts processes; all of them end with this one, and have its environment and folder."""

    def __init__(self, *, environment: Mapping[str, str] = ENVIRONMENT, folder: Path = ROOT) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._changed = threading.Condition()
        self._started: list[Forked] = []
        with theirs:
            words = [sys.executable, __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment, cwd=folder)
        threading.Thread(target=self._listen, daemon=True).start()

    def fork(self, words: Sequence[object], *, streams: Sequence[int], host: str | None = None) -> Forked:
        """Start `llamarun ...`, `llamaplan ...`, `runtime.worker ...` or `python FILE`, in a network namespace or here.

        `streams` are its stdin, stdout and stderr; whoever calls closes its own.
        """
        line = json.dumps({"command": [str(word) for word in words], "host": host}).encode()
        with self._changed:
            count = len(self._started)
            socket.send_fds(self._socket, [line], list(streams))
            assert self._changed.wait_for(lambda: len(self._started) > count, timeout=120)
            return self._started[-1]

    def start(
        self, words: Sequence[object], *, output: Path, reads: Path = Path(os.devnull), host: str | None = None
    ) -> Child:
        """The same for a process that reads a file and writes into files."""
        with reads.open() as given, output.open("w") as out, output.with_suffix(".err").open("w") as err:
            streams = [file.fileno() for file in (given, out, err)]
            return Child(self.fork(words, streams=streams, host=host), output)

    def close(self) -> None:
        """End it, and with it all that it started."""
        self._server.kill()
        self._server.wait()
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while line := self._socket.recv(1000).decode():
                what, pid, *rest = line.split()
                with self._changed:
                    if what == "started":
                        self._started.append(Forked(int(pid)))
                    else:
                        ended = next(process for process in self._started[::-1] if process.pid == int(pid))
                        ended.returncode, ended.ended_at = int(rest[0]), float(rest[1])
                        ended.has_ended.set()
                    self._changed.notify_all()


@cache
def the_nursery() -> Nursery:
    """The one of this process, which ends with it."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


def _main(orders: socket.socket) -> None:
    import runtime.cli.batch
    import runtime.cli.bench
    import runtime.cli.chat
    import runtime.cli.generate
    import runtime.distributed.opening
    import runtime.distributed.serve
    import runtime.distributed.session
    import runtime.session
    import runtime.worker  # noqa: F401

    gc.collect()
    gc.freeze()  # or every child would copy what it looks at for garbage
    children: dict[int, int] = {}  # what becomes readable when a process ends -> its pid
    while True:
        for ready in select.select([orders, *children], [], [])[0]:
            if ready is orders:
                line, streams, _, _ = socket.recv_fds(orders, 1 << 16, 3)
                if not line:
                    return
                if not (pid := os.fork()):
                    _become(json.loads(line), streams, orders)
                for stream in streams:
                    os.close(stream)
                children[os.pidfd_open(pid)] = pid
                orders.send(f"started {pid}".encode())
            else:
                pid = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                orders.send(f"ended {pid} {code} {time.monotonic()}".encode())


def _become(order: dict[str, Any], streams: Sequence[int], orders: socket.socket) -> NoReturn:
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it dies with this process
        orders.close()
        if order["host"]:
            namespace = os.open(f"/run/netns/{order['host']}", os.O_RDONLY)
            assert ctypes.CDLL(None).setns(namespace, _CLONE_NEWNET) == 0
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        sys.argv = order["command"]
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
        if sys.argv[0] == "python":
            _run_file(sys.argv[1])
        importlib.import_module(MODULES[sys.argv[0]]).main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _run_file(path: str) -> NoReturn:
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
