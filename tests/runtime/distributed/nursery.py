"""A process that has imported everything and forks the processes of jobs, each in its network namespace.

Importing torch takes longer than what is tested. Run as a program it takes one JSON object per line, `command`, `host`
and `output`, and says `started PID` and `ended PID CODE`.
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_CLONE_NEWNET = 0x40000000


@dataclass(slots=True)
class Child:
    """A forked process."""

    nursery: "Nursery"
    pid: int
    output: Path

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
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if self.pid in self.nursery.ends:
                return self.nursery.ends[self.pid]
            time.sleep(0.02)
        raise AssertionError(f"still runs: {self.said}")


class Nursery:
    """Starts children."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.ends: dict[int, tuple[int, float]] = {}
        self._started: list[int] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, words: Sequence[object], *, output: Path, host: str = "") -> Child:
        """Start `llamarun ...` or `runtime.worker ...`, in a network namespace if one is named."""
        count = len(self._started)
        assert self._process.stdin is not None
        line = {"command": [str(word) for word in words], "host": host, "output": str(output)}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        while len(self._started) == count:
            assert self._process.poll() is None
            time.sleep(0.01)
        return Child(self, self._started[-1], output)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, pid, *code = line.split()
            if what == "started":
                self._started.append(int(pid))
            else:
                self.ends[int(pid)] = int(code[0]), time.monotonic()


@contextmanager
def open_nursery() -> Iterator[Nursery]:
    """A nursery; every child ends with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            yield Nursery(process)
        finally:
            process.terminate()


def _main() -> None:
    import runtime.distributed.serve
    import runtime.distributed.session
    import runtime.session  # noqa: F401

    children: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            if not (pid := os.fork()):
                _become(json.loads(line))
            children.add(pid)
            print("started", pid, flush=True)
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                print("ended", pid, os.waitstatus_to_exitcode(status), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    ctypes.CDLL(None).prctl(1, 9)  # it dies with this process
    if order["host"]:
        namespace = os.open(f"/run/netns/{order['host']}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(namespace, _CLONE_NEWNET) == 0
    output = Path(order["output"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, descriptor in ((output, 1), (output.with_suffix(".err"), 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    sys.argv = order["command"]
    if sys.argv[0] == "llamarun":
        from runtime.cli import main as llamarun

        llamarun()
    from runtime.worker import main as worker

    worker()


if __name__ == "__main__":
    _main()
