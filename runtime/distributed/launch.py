"""Start one local worker per further stage. They inherit their control connection and die with this process."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime.distributed.channel import Channel
from runtime.distributed.members import LocalProcess
from runtime.distributed.team import Team


def start_local(team: Team, rank: int, target: Path, *, model: Path | None) -> None:
    """Start the worker of one stage on this machine and make it a member of the team.

    Args:
        team: gets the new member.
        rank: its stage.
        target: what the command was given.
        model: the checkpoint of a plan file.
    """
    arguments = [str(target.absolute())]
    if model is not None:
        arguments += ["--model", str(model.absolute())]
    channel, process = start_worker(rank, arguments)
    team.adopt(rank, channel, process)


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
    command = [sys.executable, "-m", "runtime.worker", *arguments]
    command += ["--rank", str(rank), "--control-fd", str(theirs.fileno()), "--parent", str(os.getpid())]
    with theirs:
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            # Ctrl-C in a terminal reaches a whole group of processes; workers are told by the driver instead.
            start_new_session=True,
        )
    return Channel(ours, name=f"rank {rank}"), LocalProcess(process, errors)
