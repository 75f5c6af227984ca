"""Read many thousand hostile inputs: `python -m tests.hostile.fuzz --inputs 20000`; see README.md beside this file."""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests.hostile import fuzz_files, fuzz_gguf, fuzz_runtime, fuzz_spellings
from tests.hostile.fuzz_reader import READERS, Reader, judge, made

WINGS = (fuzz_files, fuzz_gguf, fuzz_runtime, fuzz_spellings)
MAX_SECONDS, MAX_BYTES = 60, 8 << 30
"""What ends the process that reads: an input that hangs or eats, and is no longer waited for."""
MAX_FAULTS = 20


@dataclass(slots=True)
class Outcome:
    """What came of the inputs of one reader; faults are (number, what)."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    worst_seconds: float = 0.0
    worst_extra_bytes: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Reader]:
    """Open a reader in a folder of its own, as small warnings of libraries go nowhere."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        yield READERS[name](Path(folder))


def fuzz(name: str, *, inputs: int, seed: int, begin: int = 0, place: Path | None = None) -> Outcome:
    """Read inputs `begin` to `inputs` - 1 in this process; each is named in `place` before it is read, and timed."""
    found, began = Outcome(), time.perf_counter()
    with opened(name) as way, (place or Path(os.devnull)).open("w") as file:
        for number in range(begin, inputs):
            if place is not None:
                os.pwrite(file.fileno(), f"{number:09d}".encode(), 0)
                signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # nobody listens: the process ends
            verdict = judge(way, made(name, way, seed=seed, number=number))
            found.inputs += 1
            found.accepted += verdict.is_accepted
            found.worst_seconds = max(found.worst_seconds, verdict.seconds)
            found.worst_extra_bytes = max(found.worst_extra_bytes, verdict.extra_bytes)
            if verdict.fault:
                found.faults.append((number, verdict.fault))
            if len(found.faults) >= MAX_FAULTS:
                break
    found.seconds = time.perf_counter() - began
    return found


def fuzz_apart(name: str, *, inputs: int, seed: int, begin: int) -> Outcome:
    """Read the inputs in a process of its own, which is ended at the first that hangs, crashes or eats memory."""
    with tempfile.TemporaryDirectory() as folder:
        place, result = Path(folder) / "number", Path(folder) / "result.json"

        def work() -> None:
            _bound_this_process()
            found = fuzz(name, inputs=inputs, seed=seed, begin=begin, place=place)
            result.write_text(json.dumps(asdict(found)))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join()
        if result.exists():
            return Outcome(**json.loads(result.read_text()))
        number = int(place.read_text() or 0) if place.exists() else 0
        return Outcome(inputs=number - begin, faults=[(number, f"ended its process ({process.exitcode})")])


def main() -> int:
    """Run as the arguments say, and return 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("--reader", choices=list(READERS), action="append", help="only this one; repeatable")
    parser.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="write the input with this number to stdout, and read it")
    given = parser.parse_args()
    if given.only is not None:
        return _replay(given.reader[0], seed=given.seed, number=given.only)
    return _all(given.reader or list(READERS), inputs=given.inputs, seed=given.seed, begin=given.begin)


def _all(names: list[str], *, inputs: int, seed: int, begin: int) -> int:
    num_faults = 0
    print("| reader | inputs | accepted | seconds | slowest | most memory | faults |\n|---|---|---|---|---|---|---|")
    for name in names:
        found = fuzz_apart(name, inputs=inputs, seed=seed, begin=begin)
        print(
            f"| {name} | {found.inputs:,} | {found.accepted:,} | {found.seconds:.0f} | {found.worst_seconds:.2f} s "
            f"| {found.worst_extra_bytes >> 20} MiB | {len(found.faults)} |",
            flush=True,
        )
        for number, what in found.faults:
            print(f"  --reader {name} --seed {seed} --only {number}: {what}", file=sys.stderr, flush=True)
        num_faults += len(found.faults)
    return 1 if num_faults else 0


def _replay(name: str, *, seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        way = READERS[name](Path(folder))
        data = made(name, way, seed=seed, number=number)
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.flush()
        verdict = judge(way, data)
        print(verdict, file=sys.stderr)
        if verdict.fault:
            way.read(data)  # for the traceback
    return 1 if verdict.fault else 0


def _bound_this_process() -> None:
    limit = psutil.Process().memory_info().vms + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
