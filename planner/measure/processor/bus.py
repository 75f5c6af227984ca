"""What several CPU processes of this machine read together: all at once, each with its own threads and its own memory.

Every process reads in blocks through the kernels that decode (through torch where there is no compiler), from a moment
that all of them know until another one; what they read then adds up. They start by a line on stdin and answer with one
on stdout.
"""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from plans.commands.children import python_command

ROUNDS, SECONDS = 5, 0.2
"""The best round counts: other programs can only take from what there is."""
BLOCK_BYTES = 8 << 20
LEAST_BYTES = 1 << 20
START_SECONDS = 0.01
"""From the line that tells a process to begin until it does."""
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process does."""

    num_bytes: int
    """Of memory that it goes through again and again."""
    threads: int


def read_together(num_processes: int, *, num_bytes: int, threads: int) -> float | None:
    """Return the bytes per second that so many processes read when all of them read at once.

    Args:
        num_processes: how many.
        num_bytes: of memory altogether, shared out among them: as much as a step reads, so that a cache keeps no more
            of it than of the weights.
        threads: of each.

    Returns:
        None if a process could not be started or did not answer.
    """
    reading = Reading(max(num_bytes // num_processes, LEAST_BYTES), threads)
    try:
        with ExitStack() as stack:
            processes = [stack.enter_context(_Process(reading)) for _ in range(num_processes)]
            limit = threading.Timer(TIMEOUT_SECONDS, _kill, [processes])
            limit.daemon = True
            limit.start()
            stack.callback(limit.cancel)
            for process in processes:
                process.answer()  # it is ready
            return max(_round(processes) for _ in range(ROUNDS))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _kill(processes: "Sequence[_Process]") -> None:
    for process in processes:
        process.kill()


def _round(processes: "Sequence[_Process]") -> float:
    begin = time.monotonic() + START_SECONDS
    for process in processes:
        process.tell([begin, begin + SECONDS])
    return sum(process.answer() for process in processes)


class _Process:
    """A process that reads; it ends with its stdin."""

    def __init__(self, reading: Reading) -> None:
        self._process = subprocess.Popen(
            python_command("planner.measure.processor.bus"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.tell(asdict(reading))

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def kill(self) -> None:
        """End it; whoever waits for an answer gets a ValueError."""
        self._process.kill()

    def tell(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def answer(self) -> float:
        """Return the next line it says, a number; ValueError where it ended instead."""
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())


def main() -> None:
    """Make memory, say 0, and read whenever a line says from when until when; answer with bytes per second."""
    read = _reader(Reading(**json.loads(sys.stdin.readline())))
    print(0.0, flush=True)
    for line in sys.stdin:
        begin, end = json.loads(line)
        print(_rate(read, begin, end), flush=True)


def _rate(read: Callable[[], int], begin: float, end: float) -> float:
    while time.monotonic() < begin:
        pass
    started, num_bytes = time.monotonic(), 0
    while (now := time.monotonic()) < end or not num_bytes:
        num_bytes += read()
    return num_bytes / max(now - started, 1e-9)


def _reader(reading: Reading) -> Callable[[], int]:
    """Return what reads the next block of memory and says how many bytes that were."""
    import torch

    from plans.native.building import Unavailable
    from runtime.fast import native

    torch.set_num_threads(reading.threads)
    words = torch.ones(reading.num_bytes // 8, dtype=torch.int64)
    blocks = itertools.cycle(torch.split(words, BLOCK_BYTES // 8))
    kernels = native.load()

    def read() -> int:
        block = next(blocks)
        if not isinstance(kernels, Unavailable):
            return kernels.read_memory([block], threads=reading.threads)
        block.sum()
        return block.nbytes

    return read


if __name__ == "__main__":
    main()
