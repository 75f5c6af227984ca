"""How the workers of this machine come into being: as forks where that is safe, else from the beginning."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobs import generate, started

from tests.runtime.distributed.nursery import ENVIRONMENT

Exports = Callable[[int], Path]
STARTED_AHEAD = """
import sys
from pathlib import Path
import psutil
from plans.stages import StageRange
from runtime.distributed.control.launch import LocalWorkers

stages = [StageRange(device, 0, 1, has_embedding=False, has_head=False) for device in ("cuda:0", sys.argv[1])]
with LocalWorkers(Path("nothing")) as workers:
    workers.start_ahead(stages, device_map={1: word for word in sys.argv[2:]})
    print(len(psutil.Process().children()))
"""


@pytest.mark.parametrize(
    ("module", "is_forked"), [("runtime.cli", True), ("tests.runtime.distributed.threaded", False)]
)
def test_workers_are_forked_unless_the_command_had_threads_before(
    exports: Exports, module: str, is_forked: bool
) -> None:
    """What a fork was started with are the words of its parent."""
    with started(*generate(exports(3), "-c", 1024), module=module, is_held=True) as job:
        words = [psutil.Process(job.rank(number)).cmdline() for number in (1, 2)]
    assert [("runtime.worker" in line) for line in words] == [not is_forked] * 2


@pytest.mark.parametrize(
    ("devices", "num_started"),
    [(["cpu#1"], 0), (["box/cpu"], 0), (["cuda:1"], 1), (["cuda:1", "cpu"], 0), (["cpu", "cuda:1"], 1)],
    ids=str,
)
def test_workers_that_will_use_cuda_are_not_forked(devices: list[str], num_started: int) -> None:
    command = [sys.executable, "-c", STARTED_AHEAD, *devices]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{num_started}\n"
