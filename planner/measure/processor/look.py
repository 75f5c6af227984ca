"""Half a second's look at this machine's processor, in a process of its own: how fast it reads and multiplies.

Torch does both, with the threads that a run would have; the process that plans never loads it. The process answers
with JSON on stdout.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import Field

from planner.measure.points import last_cache_bytes
from plans.cluster import Rate
from plans.commands.children import python_command
from plans.dtypes import DTYPES, DtypeName
from plans.reading.strict import StrictModel, validate_json

if TYPE_CHECKING:
    import torch

READ_BYTES = 128 << 20
"""Read in one pass: at least this, and more than the processor's last cache holds."""
READ_SECONDS = 0.15
ROWS, WIDTH = 128, 2048
"""One product is a prompt of 128 tokens times a square matrix: 1.07 GFLOP."""
PRODUCT_SECONDS = 0.05
TIMEOUT_SECONDS = 60.0
MOST_OTHER_SHARE = 0.1
"""Of the cores that torch uses: where other programs took more, the numbers are not kept."""


class Look(StrictModel):
    """What a look found.

    Attributes:
        threads: CPU threads that torch computes with.
        read_bytes_per_second: summing up memory that no cache holds, the best pass.
        flops_per_second: of matrix products as transformers makes them, by dtype, the best product.
        has_compiler: whether the native kernels can be built, so that `--speed auto` has them.
        is_disturbed: whether other programs took part of the processor meanwhile.
    """

    threads: Annotated[int, Field(ge=1, le=4096)]
    read_bytes_per_second: Rate
    flops_per_second: dict[DtypeName, Rate]
    has_compiler: bool
    is_disturbed: bool = False


def look_in_a_process() -> Look | None:
    """Start the process that looks; None where it fails or answers nothing that makes sense."""
    try:
        done = subprocess.run(
            python_command("planner.measure.processor.look"), capture_output=True, timeout=TIMEOUT_SECONDS, check=True
        )
        return validate_json(Look, done.stdout, where="look")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def look() -> Look:
    """Measure in this process; takes about half a second where nothing else runs."""
    import torch

    from planner.measure.calm import CalmMeter
    from plans.native.building import Unavailable, find_compiler

    meter = CalmMeter()
    read = _read_rate()
    rates = {name: _product_rate(getattr(torch, DTYPES[name].torch)) for name in get_args(DtypeName)}
    return Look(
        threads=torch.get_num_threads(),
        read_bytes_per_second=read,
        flops_per_second=rates,
        has_compiler=not isinstance(find_compiler(), Unavailable),
        is_disturbed=meter.other_cores() > MOST_OTHER_SHARE * torch.get_num_threads(),
    )


def _read_rate() -> float:
    """Read memory in such pages as a file of weights has here."""
    import torch

    from runtime.reading.pages import files_get_huge_pages, prefer_huge_pages

    words = torch.empty(max(READ_BYTES, 2 * last_cache_bytes()) // 8, dtype=torch.int64)
    if files_get_huge_pages(Path(tempfile.gettempdir())):
        prefer_huge_pages(words.data_ptr(), words.nbytes)
    words.fill_(1)
    return words.nbytes / _best_seconds(lambda: words.sum(), at_least=READ_SECONDS)


def _product_rate(dtype: "torch.dtype") -> float:
    import torch

    rows, matrix = (torch.full((height, WIDTH), 0.02, dtype=dtype) for height in (ROWS, WIDTH))
    seconds = _best_seconds(lambda: torch.nn.functional.linear(rows, matrix), at_least=PRODUCT_SECONDS)
    return 2 * ROWS * WIDTH * WIDTH / seconds


def _best_seconds(work: Callable[[], object], *, at_least: float) -> float:
    """Return the shortest time of `work`, called once to warm up and then until so many seconds are over."""
    work()
    best, end = float("inf"), time.perf_counter() + at_least
    while True:
        started = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return best


if __name__ == "__main__":
    sys.stdout.write(look().to_json())
