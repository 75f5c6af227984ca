"""`python -P -m runtime.worker DIR`: one stage in a process of its own.

Started by `llamarun ... --processes`, by torchrun, or by hand on another host. Under torchrun every process runs the
same line; rank 0 becomes `llamarun generate DIR ...` (or the command named after DIR) and takes its options, the
others only look at those below.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from plans.commands.children import die_with, name_process
from plans.commands.collector import resting_collector
from plans.commands.console import Terminated, leave, run_call
from plans.errors import LlamaplanError, PeerError, UsageError
from runtime.distributed.control.address import Address, connect, parse_address
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.identity import identity_of
from runtime.distributed.control.keys import introduce, read_key
from runtime.distributed.control.messages import Abort, Beat, Failed, Identity, Job, Join, Refused, ended_by
from runtime.distributed.torchrun import Torchrun, torchrun_here
from runtime.reading.opening import Source, open_source, parse_device_map

COMMANDS = ("generate", "chat", "batch", "bench")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a worker was started with."""

    target: Path
    rank: int
    model: Path | None
    device_map: list[str]
    address: Address | None
    key_file: Path | None
    control_fd: int | None
    join_seconds: float


def main() -> NoReturn:
    """Entry point of `python -P -m runtime.worker`."""
    arguments = sys.argv[1:]
    here = torchrun_here()
    if here is not None and here.rank == 0 and arguments and not arguments[0].startswith("-"):
        _become_driver(here, arguments)
    leave(run_call(lambda: _work(parse_arguments(arguments, here)), name="runtime.worker"))


def parse_arguments(arguments: Sequence[str], here: Torchrun | None) -> Arguments:
    """Read the command line; what belongs to the driver is ignored under torchrun.

    Raises:
        UsageError: something is missing.
    """
    parser = argparse.ArgumentParser(prog="python -P -m runtime.worker", description=__doc__, allow_abbrev=False)
    parser.add_argument("target", type=Path, help="an export, or a plan file with --model")
    parser.add_argument("--rank", type=int, help="stage to compute, from 1; torchrun gives it")
    parser.add_argument("--listen", "--join", dest="listen", help="where the driver listens: ADDR:PORT or unix:PATH")
    parser.add_argument("--key-file", type=Path, help="key of the control connection, as the driver has it")
    parser.add_argument("--model", type=Path, help="the checkpoint a plan file is for")
    parser.add_argument("--device-map", action="append", default=[], help="STAGE=DEVICE, stages count from 0")
    parser.add_argument("--join-timeout", type=float, default=60.0, help="seconds to look for the driver")
    parser.add_argument("--control-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(arguments)
    if unknown and here is None and "--trusted-network" not in unknown:
        raise UsageError(f"'{unknown[0]}' is no option of a worker", hint="see python -P -m runtime.worker --help")
    if found.parent is not None:
        die_with(found.parent)
        name_process(f"llamarun {found.rank}")
    rank = found.rank if here is None else here.rank
    if rank is None:
        raise UsageError("a worker needs its place in the chain", expected="--rank N, or torchrun")
    listen = found.listen or (here.socket_path() if here else None)
    if listen is None and found.control_fd is None:
        raise UsageError("a worker needs the driver's address", expected="--join ADDR:PORT")
    return Arguments(
        target=found.target,
        rank=rank,
        model=found.model,
        device_map=found.device_map,
        address=parse_address(listen, where="--join") if listen else None,
        key_file=found.key_file,
        control_fd=found.control_fd,
        join_seconds=found.join_timeout,
    )


def _become_driver(here: Torchrun, arguments: list[str]) -> NoReturn:
    """Run the command in this process, waiting for the other ranks instead of starting workers."""
    from runtime.cli import main as llamarun

    target, *rest = arguments
    command = rest.pop(0) if rest and rest[0] in COMMANDS else "generate"
    if "--listen" not in rest:
        rest += ["--listen", here.socket_path()]
    sys.argv = ["llamarun", command, target, *rest, "--world-size", str(here.world_size)]
    llamarun()


def _work(arguments: Arguments) -> NoReturn:
    inherited = _inherited_channel(arguments)
    # Importing takes seconds; meanwhile a person is told what is wrong, and the driver does the same.
    imports = threading.Thread(target=_import_torch, daemon=True, name="imports")
    imports.start()
    try:
        source = open_source(arguments.target, model=arguments.model, only_stage=arguments.rank)
    except LlamaplanError as error:
        if inherited is not None:
            inherited.try_send(Failed(exit_code=error.exit_code, code=error.code, line=error.line()[:4000]))
        raise
    identity = identity_of(source)
    if not 1 <= arguments.rank < identity.num_stages:
        raise PeerError(
            f"there is no rank {arguments.rank} for a worker", expected=f"1 to {identity.num_stages - 1}", code="E-RANK"
        )
    channel = inherited or _reach_driver(arguments)
    try:
        job = _join(channel, arguments, identity)
        _beat_until(imports, channel)
    except Terminated as end:
        channel.try_send(ended_by(end.exit_code - 128))
        raise
    _serve(channel, arguments, source, identity, job)


def _inherited_channel(arguments: Arguments) -> Channel | None:
    if arguments.control_fd is None:
        return None
    return Channel(socket.socket(fileno=arguments.control_fd), name="the driver")


def _reach_driver(arguments: Arguments) -> Channel:
    address = arguments.address
    assert address is not None
    if not address.is_unix and arguments.key_file is None:
        raise UsageError("joining over a network needs the driver's key", expected="--key-file FILE", code="E-KEY")
    key = b"" if arguments.key_file is None else read_key(arguments.key_file)
    deadline = time.monotonic() + arguments.join_seconds
    while True:
        connection = connect(address, seconds=max(0.0, deadline - time.monotonic()))
        try:
            if not address.is_unix:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                introduce(connection, key, name=str(address))
            return Channel(connection, name="the driver")
        except OSError as error:  # a crowd of strangers may have pushed this process out before it could say a word
            connection.close()
            if time.monotonic() > deadline:
                raise PeerError(
                    f"the driver closed the connection ({error.strerror or error})", where=str(address), code="E-JOIN"
                ) from None
            time.sleep(0.1)


def _join(channel: Channel, arguments: Arguments, identity: Identity) -> Job:
    channel.set_timeout(arguments.join_seconds)
    channel.send(Join(rank=arguments.rank, host=socket.gethostname(), pid=os.getpid(), identity=identity))
    answer = channel.receive()
    channel.set_timeout(None)
    if isinstance(answer, Job):
        return answer
    if isinstance(answer, Refused | Abort):
        raise PeerError(f"the driver refused: {answer.line}", code="E-REFUSED")
    raise PeerError("the driver closed the connection before it gave a job", code="E-JOIN")


def _import_torch() -> None:
    with resting_collector():
        import torch  # noqa: F401 - whoever needs these finds them imported
        import transformers

        import runtime.distributed.serve  # noqa: F401

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _beat_until(imports: threading.Thread, channel: Channel) -> None:
    """Let the driver know that this process is alive until everything is imported."""
    while imports.is_alive():
        channel.try_send(Beat())
        imports.join(timeout=0.1)


def _serve(channel: Channel, arguments: Arguments, source: Source, identity: Identity, job: Job) -> NoReturn:
    from runtime.distributed.control.control import Control

    control = Control(channel, heartbeat_seconds=job.heartbeat_timeout_seconds)

    def leave(number: int, _frame: FrameType | None) -> None:
        control.interrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    from runtime.distributed.serve import work

    places = parse_device_map(arguments.device_map, num_stages=identity.num_stages)
    work(
        control,
        source,
        rank=arguments.rank,
        job=job,
        device=places.get(arguments.rank),
        identity=identity,
        address=channel.local_address() or "127.0.0.1",
    )


if __name__ == "__main__":
    main()
