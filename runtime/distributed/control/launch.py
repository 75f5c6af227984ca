"""Start one local worker per further stage. They inherit their control connection and die with this process."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from plans.commands.children import python_command
from plans.errors import PeerError
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.members import LocalProcess


class LocalWorkers:
    """The workers of this machine.

    Importing torch takes every process seconds, so they are started before this one does it. Use it as a context
    manager: workers that nobody took by then end with it.

    Args:
        target: what the command was given.
        model: the checkpoint of a plan file.
    """

    def __init__(self, target: Path, *, model: Path | None = None) -> None:
        self._arguments = [str(target.absolute())]
        if model is not None:
            self._arguments += ["--model", str(model.absolute())]
        self._waiting: dict[int, tuple[Channel, LocalProcess]] = {}
        self._names: Sequence[str] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        waiting, self._waiting = self._waiting, {}
        for channel, process in waiting.values():
            process.end()
            channel.close()

    def start_ahead(self, names: Sequence[str]) -> None:
        """Start the worker of every stage but the first.

        Args:
            names: what the stages are called, the first one included.
        """
        self._names = names
        for rank in range(1, len(names)):
            self._waiting[rank] = start_worker(rank, self._arguments)
        threading.Thread(target=self._watch, daemon=True, name="workers").start()

    def take(self, rank: int) -> tuple[Channel, LocalProcess]:
        """Return the worker of a stage, started now if it was not started ahead; whoever takes it ends it."""
        return self._waiting.pop(rank, None) or start_worker(rank, self._arguments)

    def _watch(self) -> None:
        """End this process, which is busy importing, when a worker is killed; other faults it hears of later."""
        while self._waiting:
            for rank, (_, process) in list(self._waiting.items()):
                if (process.process.poll() or 0) < 0 and rank in self._waiting:
                    self._leave(rank, process)
            time.sleep(0.1)

    def _leave(self, rank: int, lost: LocalProcess) -> NoReturn:
        for _, process in self._waiting.values():
            process.end()
        error = PeerError(f"{self._names[rank]} {lost.last_words()}", code="E-LOST")
        sys.stderr.write(f"error[{error.code}]: {error.line()}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)


def start_worker(rank: int, arguments: Sequence[str]) -> tuple[Channel, LocalProcess]:
    """Start the worker of one stage.

    Args:
        rank: its place in the chain.
        arguments: what it runs from, as `runtime.worker` takes it.

    Returns:
        This end of its control connection, which nobody else can reach, and its process.
    """
    ours, theirs = socket.socketpair()
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
    place = ["--rank", str(rank), "--control-fd", str(theirs.fileno()), "--parent", str(os.getpid())]
    with theirs:
        process = subprocess.Popen(
            python_command("runtime.worker", *arguments, *place),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            # Ctrl-C in a terminal reaches a whole group of processes; workers are told by the driver instead.
            start_new_session=True,
        )
    return Channel(ours, name=f"rank {rank}"), LocalProcess(process, errors)
