"""What is fuzzed, and when an input has found a fault: bounds, and the register of readers."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from plans.errors import ExitCode, LlamaplanError
from plans.reading.strict import StrictModel

Make = Callable[[Random], bytes]
Read = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One way into the program.

    Attributes:
        make: returns one hostile input; the same for the same state of the generator.
        read: reads it; may raise our errors alone.
        max_seconds: of the processor, for one input.
        max_extra_bytes: resident memory that one input may add for a moment.
    """

    make: Make
    read: Read
    max_seconds: float = 2.0
    max_extra_bytes: int = 300 << 20


READERS: dict[str, Callable[[Path], Reader]] = {}
"""By name: opens a reader, given an empty folder of its own."""


def reader(function: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    """Register the function below under its name."""
    READERS[function.__name__] = function
    return function


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one input went; `fault` is empty where all is well."""

    fault: str
    is_accepted: bool
    seconds: float
    extra_bytes: int


def made(name: str, opened: Reader, *, seed: int, number: int) -> bytes:
    """Return the input with this number; it depends on nothing else."""
    return opened.make(Random(f"{seed} {name} {number}"))


def judge(opened: Reader, data: bytes) -> Verdict:
    """Read one input and look at what came of it."""
    before, _ = _memory()
    _forget_peak()
    began = time.process_time()
    fault, is_accepted = _outcome(opened, data)
    seconds = time.process_time() - began
    extra = max(0, _memory()[1] - before)
    if not fault and seconds > opened.max_seconds:
        fault = f"took {seconds:.1f} s"
    if not fault and extra > opened.max_extra_bytes:
        fault = f"needed {extra >> 20} MiB"
    return Verdict(fault, is_accepted, seconds, extra)


def _outcome(opened: Reader, data: bytes) -> tuple[str, bool]:
    try:
        opened.read(data)
    except LlamaplanError as error:
        is_clean = error.line().isprintable() and len(error.line()) < 2100 and error.exit_code != ExitCode.BUG
        return ("" if is_clean else f"a poor message: {error.line()!a:.300}"), False
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exception
        return f"{type(error).__name__}: {error!s:.300}", False
    return "", True


def reads_back(value: StrictModel) -> None:
    """Require that what was accepted is written so that it reads back as the same."""
    text = value.to_json()
    again = type(value).from_json(text.encode(), where="what was written")
    assert again == value, "reads back as something else"
    assert again.to_json() == text, "is written differently the second time"


def _memory() -> tuple[int, int]:
    """Resident bytes now, and the most since `_forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return found["VmRSS"], found["VmHWM"]


def _forget_peak() -> None:
    # Where this is not allowed, peaks of other inputs are counted too, and a fault is found rather than missed.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
