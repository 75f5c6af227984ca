"""How a process of ours starts another Python: with the modules of this one, and none from the current folder."""

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from plans.errors import ExitCode

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_HOME = str(Path(__file__).parents[2])


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in a new interpreter.

    ``python -m`` and ``-c`` look into the current folder first, where a ``json.py`` or ``torch.py`` beside somebody's
    checkpoint would be run. ``-P`` keeps it out; the module search path is handed over instead.

    Args:
        module: dotted name; it runs as ``__main__``.
        arguments: what it finds in ``sys.argv[1:]``.

    Example:
        >>> python_command("runtime.worker", "shards/")[-2:]
        ['runtime.worker', 'shards/']
    """
    return [sys.executable, "-P", "-c", _START, json.dumps(_search_path()), module, *arguments]


def _search_path() -> list[str]:
    return [*(path for path in sys.path if Path(path).is_absolute()), _HOME]


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when the one that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(ExitCode.PEER)


def name_process(name: str) -> None:
    """Set what `ps -e` and `top` call this process; 15 letters at most."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def has_one_thread() -> bool:
    """Whether nothing in this process, native libraries included, has started a thread."""
    return len(list(Path("/proc/self/task").iterdir())) == 1


class ForkedPython:
    """A module that runs in a fork of this process, with all that is imported here; the part of `Popen` that we use.

    A lock that another thread holds is held in a fork for ever, and pools of threads are missing there. So only a
    process forks that has started none: libraries may be imported, but nothing computed.

    Args:
        module: dotted name; it runs as ``__main__`` in a session of its own, without input and output.
        arguments: what it finds in ``sys.argv[1:]``.
        errors: descriptor that its stderr goes to.
        closes: connections that are this process's alone; another end hears that they are closed only when all are.

    Attributes:
        pid: the process.
    """

    def __init__(self, module: str, *arguments: str, errors: int, closes: Iterable[socket.socket]) -> None:
        self._lock = threading.Lock()  # two threads that look must not both take its exit code
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        # Until it is a process of its own, no signal may make the child run this process's handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            _run_forked(module, arguments, errors=errors, closes=closes, mask=mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def poll(self) -> int | None:
        """Return its exit code, the negative number of the signal that killed it, or None while it runs."""
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _run_forked(
    module: str, arguments: Sequence[str], *, errors: int, closes: Iterable[socket.socket], mask: Iterable[int]
) -> NoReturn:
    """Never returns: whoever called `fork` must not go on twice."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, stream in ((nothing, 0), (nothing, 1), (errors, 2)):
            os.dup2(descriptor, stream)
        for connection in closes:
            connection.close()
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.argv[1:], sys.path[:] = arguments, _search_path()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
