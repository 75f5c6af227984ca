"""What can go wrong, as typed exceptions that know their exit code.

Every message a person sees is one line: ``error[E-...]: where: what; expected ...; hint``. The exit codes are
part of the command-line contract and never change meaning.
"""

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit status of both commands."""

    OK = 0
    BUG = 1
    USAGE = 2
    BAD_INPUT = 3
    INFEASIBLE = 4
    INTEGRITY = 5
    ENVIRONMENT = 6
    PEER = 7
    NUMERICAL = 8
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


def printable(text: object, *, limit: int = 120) -> str:
    """Escape control characters and cut to `limit`, so that hostile names cannot garble a terminal."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


class LlamaplanError(Exception):
    """Base of every error with a known cause.

    Args:
        what: what happened, with the numbers involved.
        where: file, JSON pointer, tensor or option the error is about.
        expected: what would have been accepted.
        hint: what to do next.
        code: short identifier shown in brackets; the class's own when empty.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG
    default_code: ClassVar[str] = "E-BUG"

    def __init__(self, what: str, *, where: object = "", expected: str = "", hint: str = "", code: str = "") -> None:
        self.what = what
        self.where = printable(where, limit=300)
        self.expected = expected
        self.hint = hint
        self.code = code or self.default_code
        super().__init__(self.line())

    def line(self) -> str:
        """Return the whole message on one line, without the ``error[...]`` prefix."""
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.hint:
            parts.append(self.hint)
        return printable("; ".join(parts), limit=2000)


class UsageError(LlamaplanError, ValueError):
    """The command line or an argument is wrong."""

    exit_code = ExitCode.USAGE
    default_code = "E-USAGE"


class InputError(LlamaplanError, ValueError):
    """A file is missing, malformed or not supported."""

    exit_code = ExitCode.BAD_INPUT
    default_code = "E-INPUT"


class InfeasibleError(LlamaplanError):
    """No plan satisfies the constraints, or none was found in time."""

    exit_code = ExitCode.INFEASIBLE
    default_code = "E-INFEASIBLE"


class IntegrityError(LlamaplanError):
    """Something does not match what was recorded for it."""

    exit_code = ExitCode.INTEGRITY
    default_code = "E-INTEGRITY"


class MachineError(LlamaplanError):
    """This machine cannot do it: disk, permission, port, device or memory."""

    exit_code = ExitCode.ENVIRONMENT
    default_code = "E-MACHINE"


class PeerError(LlamaplanError):
    """Another process of the run was lost or did not answer in time."""

    exit_code = ExitCode.PEER
    default_code = "E-PEER"


class NumericalError(LlamaplanError):
    """A computation produced NaN or infinity."""

    exit_code = ExitCode.NUMERICAL
    default_code = "E-NUMERICAL"
