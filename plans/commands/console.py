"""The plumbing both command lines share: one output object, and one place that turns exceptions into a sentence."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from plans.commands.collector import FEWER_COLLECTIONS
from plans.errors import ExitCode, LlamaplanError, MachineError, printable

if TYPE_CHECKING:
    import typer
    from rich.console import Console as RichConsole
    from rich.table import Table


PIPE_WIDTH = 200


@dataclass(slots=True)
class Output:
    """Where a command writes: data to stdout, everything else to stderr.

    Args:
        json: print one JSON document instead of tables and text.
        quiet: no progress, notes or hints (warnings and errors stay).
    """

    json: bool = False
    quiet: bool = False
    _consoles: "dict[bool, RichConsole]" = field(default_factory=dict)

    def _console(self, *, to_stderr: bool) -> "RichConsole":
        from rich.console import Console

        if to_stderr not in self._consoles:
            stream = sys.stderr if to_stderr else sys.stdout
            # Nobody's window limits a pipe or a file: nothing in a table is cut there.
            width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
            self._consoles[to_stderr] = Console(stderr=to_stderr, highlight=False, soft_wrap=False, width=width)
        return self._consoles[to_stderr]

    @property
    def progress_console(self) -> "RichConsole":
        """The stderr console, for progress bars; `is_terminal` says whether anybody sees it."""
        return self._console(to_stderr=True)

    @contextlib.contextmanager
    def spinner(self, text: str, *, style: str = "dots") -> Iterator[Callable[[str], None]]:
        """Show that something is happening, on stderr, if somebody sees it; yield what changes the words."""
        if self.quiet or not self.progress_console.is_terminal:
            yield lambda _text: None
            return
        with self.progress_console.status(text, spinner=style) as status:
            yield status.update

    @contextlib.contextmanager
    def progress(
        self, what: str = "", *, done: int = 0, total: int | None = None, unit: Literal["bytes", "items"] | None = None
    ) -> Iterator[Callable[..., None]]:
        """Show a bar on stderr, if somebody sees it; yield what is told (done, total), and `what` where that changes.

        Args:
            what: what is being done.
            done: how much was done before.
            total: of how much; None until it is known.
            unit: what to show beside the bar: bytes and their rate, or how many of how many.
        """
        if self.quiet or not self.progress_console.is_terminal:
            yield lambda _done, _total, what="": None  # noqa: ARG005
            return
        from rich import progress as rich

        beside = {
            "bytes": (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn()),
            "items": (rich.MofNCompleteColumn(),),
        }.get(unit or "", ())
        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *beside, rich.TimeRemainingColumn())
        with rich.Progress(*columns, console=self.progress_console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda done, total, what=what: bar.update(task, description=what, completed=done, total=total)

    def show(self, renderable: object) -> None:
        """Print a table or text for people on stdout; nothing with --json."""
        if not self.json:
            self._console(to_stderr=False).print(renderable, soft_wrap=isinstance(renderable, str))

    def data(self, value: object) -> None:
        """Print a JSON document on stdout; nothing without --json."""
        if self.json:
            from plans.reading.strict import dump_json

            sys.stdout.write(dump_json(value))

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        if not self.quiet:
            self._console(to_stderr=True).print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self._console(to_stderr=True).print(f"warning: {printable(text, limit=2000)}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def leaving_at_once(self, *, first: Callable[[], None] | None = None) -> Iterator[None]:
        """End the process in the signal handler within the block; for imports, where nothing else has to be cleaned up.

        Libraries lose an exception that a handler raises while they are imported, and the command would go on.
        `first` is called before.
        """

        def end(number: int, _frame: FrameType | None) -> None:
            if first is not None:
                first()
            self.progress_console.show_cursor()
            _say("interrupted" if number == signal.SIGINT else "terminated", number)
            sys.stderr.flush()
            os._exit(128 + number)

        before = {number: signal.getsignal(number) for number in _signals()}
        for number in before:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def next_step(self, command: str) -> None:
        """End a command by naming the next one."""
        self.note(f"next: {command}")


def table(*texts: str, numbers: Sequence[str] = (), folded: Sequence[str] = ()) -> "Table":
    """Return an empty table: columns of text, then of numbers, to the right.

    Long text is cut, except in the columns of `folded`; those that are not among `texts` come last.
    """
    from rich.table import Table

    found = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in (*texts, *numbers, *(name for name in folded if name not in texts)):
        found.add_column(
            name,
            justify="right" if name in numbers else "left",
            overflow="fold" if name in folded else "ellipsis",
            no_wrap=name not in folded,
        )
    return found


def run_command(app: "typer.Typer", *, name: str) -> int:
    """Run a typer app and return the documented exit code."""
    return run_call(lambda: app(standalone_mode=False, prog_name=name), name=name)


def run_call(call: Callable[[], Any], *, name: str) -> int:
    """Run something and return the documented exit code; the only place where exceptions become text."""
    gc.set_threshold(*FEWER_COLLECTIONS)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell ignores it for its background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _on_signal)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _on_signal)
    is_debug = "--debug" in sys.argv
    if is_debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    return _flush(_guarded(call, name=name, is_debug=is_debug))


def leave(code: int) -> NoReturn:
    """End this process."""
    # Taking torch down takes Python a second, for nothing: whatever had to be cleaned up has been.
    if "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; unwinds like Ctrl-C so that staging folders and children are cleaned up."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(number)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def _guarded(call: Callable[[], Any], *, name: str, is_debug: bool) -> int:
    from typer import Abort, Exit, TyperException

    try:
        result = call()
        if result == ExitCode.INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else ExitCode.OK
    except LlamaplanError as error:
        if is_debug:
            raise
        return _say(f"error[{error.code}]: {error.line()}", error.exit_code)
    except TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a bare command shows its help
            return _say(message, ExitCode.USAGE)
        return _say(
            f"error[E-USAGE]: {printable(message.rstrip('.'), limit=2000)}; see '{name} --help'", ExitCode.USAGE
        )
    except Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        _let_signals_end_us()
        return _say("interrupted", ExitCode.INTERRUPTED)
    except Terminated as error:
        _let_signals_end_us()
        return _say("terminated", error.exit_code)
    except SystemExit as left:
        # typer turns a closed stdout into exit code 1 before we see it
        if isinstance(left.__context__, BrokenPipeError):
            return ExitCode.BROKEN_PIPE
        raise
    except MemoryError:
        return _say("error[E-MEMORY]: this machine is out of memory", ExitCode.ENVIRONMENT)
    except OSError as error:
        if is_debug:
            raise
        fault = MachineError(f"{error.strerror or error} (errno {error.errno})", where=error.filename or "")
        return _say(f"error[{fault.code}]: {fault.line()}", fault.exit_code)
    except Exception as error:
        if is_debug:
            raise
        return _say(
            f"error[E-BUG]: {type(error).__name__}: {printable(error, limit=500)}; this is a bug of ours; "
            "run again with --debug and report the traceback",
            ExitCode.BUG,
        )


def _let_signals_end_us() -> None:
    """While leaving, a second signal ends the process at once instead of raising where nobody catches."""
    for number in _signals():
        signal.signal(number, signal.SIG_DFL)


def _signals() -> list[signal.Signals]:
    """The signals that end a command, without those that a shell ignores for it."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _say(line: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
    return code


def _flush(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain again at exit: point stdout at nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or ExitCode.BROKEN_PIPE
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    return code
