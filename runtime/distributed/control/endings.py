"""How the driver's own end is told to its workers."""

from plans.console import Terminated
from plans.errors import ExitCode, LlamaplanError, printable


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
