"""How a process of ours starts another Python: with the modules of this one, and none from the current folder."""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from plans.errors import ExitCode

_PR_SET_PDEATHSIG = 1

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
    paths = [path for path in sys.path if Path(path).is_absolute()]
    return [sys.executable, "-P", "-c", _START, json.dumps([*paths, _HOME]), module, *arguments]


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when the one that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(ExitCode.PEER)
