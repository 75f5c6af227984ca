"""The driver's view of one other process, and how its end is put into words."""

import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from plans.commands.children import ForkedPython
from plans.commands.console import Terminated
from plans.errors import (
    ExitCode,
    InputError,
    IntegrityError,
    LlamaplanError,
    MachineError,
    NumericalError,
    PeerError,
    UsageError,
    printable,
)
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.messages import ENDED, Failed, Join, Numbers, Ready


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code that an error will leave with."""
    if isinstance(error, LlamaplanError):
        return error.exit_code
    if isinstance(error, Terminated):
        return error.exit_code
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.PEER


def describe(error: BaseException | None) -> str:
    """Return an error as part of a sentence."""
    if isinstance(error, LlamaplanError):
        return error.line()
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return printable(error or "leaving", limit=500)


@dataclass(slots=True)
class LocalProcess:
    """A worker that this process started.

    Attributes:
        errors: file its stderr goes to.
    """

    process: subprocess.Popen[bytes] | ForkedPython
    errors: IO[bytes]

    def end(self) -> None:
        """End it whatever it is doing, and wait until it is gone."""
        self.process.kill()  # a stopped process dies of this, too
        self.process.wait()

    def last_words(self) -> str:
        """Return how it ended, with the last line it wrote."""
        try:
            code = self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return "closed its control connection"
        self.errors.seek(max(0, self.errors.seek(0, 2) - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        said = f"; it said: {printable(lines[-1], limit=300)}" if lines else ""
        if code == -signal.SIGKILL:
            return f"was killed by signal 9 (by hand, or by the system for lack of memory){said}"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}{said}"
        if code > 128:  # it could still tidy up
            return f"was ended by {signal.Signals(code - 128).name}"
        return f"left with exit code {code}{said}"


@dataclass(slots=True)
class Member:
    """A worker, from its first message on."""

    rank: int
    name: str
    """Such as `stage 1 (layers 3-5)`."""
    channel: Channel
    local: LocalProcess | None = None
    join: Join | None = None
    ready: Ready | None = None
    formed_epoch: int = -1
    numbers: Numbers | None = None
    farewell: str = ""
    """What ended it, if it could say so."""
    is_finished: bool = False
    is_replaced: bool = False

    @property
    def who(self) -> str:
        """Return its name with process and host, as far as they are known."""
        return self.name if self.join is None else f"{self.name}, process {self.join.pid} on {self.join.host}"

    def ended(self) -> PeerError:
        """Return the error of a worker whose control connection is gone."""
        if self.farewell:
            return PeerError(f"{self.who} {self.farewell}", code=ENDED)
        what = self.local.last_words() if self.local else "is gone: its control connection broke"
        return PeerError(f"{self.who} {what}", code="E-LOST")

    def silent(self, seconds: float) -> PeerError:
        """Return the error of a worker that is not heard of."""
        return PeerError(
            f"{self.who} has given no sign of life for {seconds:.0f} s",
            hint="its machine or the network is stuck; --heartbeat-timeout sets how long to wait",
            code="E-SILENT",
        )


class InterruptedPeerError(PeerError):
    """A person or the system ended a worker on purpose."""

    exit_code = ExitCode.INTERRUPTED
    default_code = "E-INTERRUPTED"


_KINDS: Mapping[int, type[LlamaplanError]] = {
    kind.exit_code: kind
    for kind in (UsageError, InputError, IntegrityError, MachineError, NumericalError, InterruptedPeerError)
}


def error_of(failed: Failed, *, who: str, is_running: bool) -> LlamaplanError:
    """Return what a worker reported as the error it would have been in this process.

    Once the run is under way, a machine that cannot go on is a lost peer to all others.
    """
    kind = _KINDS.get(failed.exit_code, PeerError)
    if is_running and kind is MachineError:
        kind = PeerError
    return kind(f"{who}: {failed.line}", code=failed.code)
