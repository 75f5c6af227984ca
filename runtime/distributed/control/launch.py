"""Start one local worker per further stage. They inherit their control connection and die with this process."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, Self

from plans.commands.children import ForkedPython, has_one_thread, python_command
from plans.errors import PeerError
from plans.stages import StageRange, stage_names
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.members import LocalProcess


class LocalWorkers:
    """The workers of this machine.

    Importing torch takes seconds of a core. Workers of the CPU are forked from this process once it has done so. A
    process with threads cannot fork, and CUDA does not work in a fork of a process that uses it: then workers start
    anew, before this process imports, so that all do it side by side.

    Use it as a context manager: workers that nobody took by then end with it.

    Args:
        target: what the command was given.
        model: the checkpoint of a plan file.
    """

    def __init__(self, target: Path, *, model: Path | None = None) -> None:
        self._arguments = [str(target.absolute())]
        if model is not None:
            self._arguments += ["--model", str(model.absolute())]
        self._can_fork = has_one_thread()
        self._waiting: dict[int, tuple[Channel, LocalProcess]] = {}
        self._names: Sequence[str] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End those that nobody took."""
        waiting, self._waiting = self._waiting, {}
        for channel, process in waiting.values():
            process.end()
            channel.close()

    def start_ahead(self, stages: Sequence[StageRange], *, device_map: Mapping[int, str]) -> None:
        """Start the worker of every stage but the first, unless they will be forked; torch is not imported yet.

        Args:
            stages: all of them, the first one included.
            device_map: zero-based stage index -> device, where it differs from the plan's.
        """
        self._names = stage_names(stages)
        devices = [device_map.get(rank, stage.device) for rank, stage in enumerate(stages)]
        self._can_fork = self._can_fork and all(map(_is_cpu, devices[1:]))
        if not self._can_fork:
            self._start(start_worker)

    def fork(self) -> None:
        """Start them now, if they were not; all they need is imported, and nothing was computed."""
        if self._can_fork:
            pairs = {rank: socket.socketpair() for rank in range(1, len(self._names))}
            self._start(partial(_fork_worker, pairs=pairs))
            for _, theirs in pairs.values():
                theirs.close()

    def _start(self, start: Callable[[int, Sequence[str]], tuple[Channel, LocalProcess]]) -> None:
        for rank in range(1, len(self._names)):
            self._waiting[rank] = start(rank, self._arguments)
        threading.Thread(target=self._watch, daemon=True, name="workers").start()

    def take(self, rank: int) -> tuple[Channel, LocalProcess]:
        """Return the worker of a stage, started now if it was not started ahead; whoever takes it ends it."""
        return self._waiting.pop(rank, None) or start_worker(rank, self._arguments)

    def _watch(self) -> None:
        """End this process, which is busy opening, when a worker is killed; other faults it hears of later."""
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
    with theirs:
        process = subprocess.Popen(
            python_command("runtime.worker", *arguments, *_place(rank, theirs)),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            # Ctrl-C in a terminal reaches a whole group of processes; workers are told by the driver instead.
            start_new_session=True,
        )
    return Channel(ours, name=f"rank {rank}"), LocalProcess(process, errors)


def _fork_worker(
    rank: int, arguments: Sequence[str], *, pairs: Mapping[int, tuple[socket.socket, socket.socket]]
) -> tuple[Channel, LocalProcess]:
    """The same as a fork of this process; `pairs` are the control connections of all workers."""
    ours, theirs = pairs[rank]
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
    process = ForkedPython(
        "runtime.worker",
        *arguments,
        *_place(rank, theirs),
        errors=errors.fileno(),
        closes=[end for pair in pairs.values() for end in pair if end is not theirs],
    )
    return Channel(ours, name=f"rank {rank}"), LocalProcess(process, errors)


def _place(rank: int, control: socket.socket) -> list[str]:
    return ["--rank", str(rank), "--control-fd", str(control.fileno()), "--parent", str(os.getpid())]


def _is_cpu(device: str) -> bool:
    return device.rsplit("/", 1)[-1].partition("#")[0] == "cpu"
