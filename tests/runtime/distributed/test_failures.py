"""What a job of several processes does when one of them is lost, stuck or told to leave. Real processes throughout."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from jobs import Job, generate, has_loaded_torch, is_alive, is_connected, started, wait_for

from tests.runtime.distributed.nursery import Nursery

LOST, INTERRUPTED = 7, 130
Exports = Callable[[int], Path]

AT_THE_START = "at the start"
LOADING = "loading"
READING = "reading the prompt"
WRITING = "writing"
PHASES = (AT_THE_START, LOADING, READING, WRITING)
LOST_SECONDS, INTERRUPTED_SECONDS = 2.0, 1.0
"""The contract's own limits; alone on the machine both take a few tenths of a second."""
SLOW_PROMPT = ["--prefill-chunk", 1, "-c", 1024]
LONG = "x = 1\n" * 200


@contextmanager
def started_for(phase: str, folder: Path) -> Iterator[Job]:
    """A job that takes its time in a phase; in the first two, its workers import as it does itself."""
    words: Sequence[object] = generate(folder, "-c", 1024)
    if phase == READING:
        words = ["generate", folder, "--processes", "--threads", 1, "-p", LONG, "-n", 9, *SLOW_PROMPT]
    module = "tests.runtime.distributed.threaded" if phase in {AT_THE_START, LOADING} else "runtime.cli"
    with started(*words, module=module) as job:
        yield job


def reach(job: Job, phase: str) -> bytes:
    """Wait until a job is in a phase; returns the text so far."""
    worker = job.rank(1)
    if phase == LOADING:
        wait_for(lambda: has_loaded_torch(worker))
    if phase == READING:
        wait_for(lambda: is_connected(worker))
    return job.first_text() if phase == WRITING else b""


@pytest.mark.alone
@pytest.mark.row("N5", "N14")
@pytest.mark.parametrize(("rank", "phase"), [(1, AT_THE_START), (2, LOADING), (1, READING), (2, WRITING)])
def test_when_a_worker_is_killed_everybody_leaves_in_two_seconds_naming_it(
    exports: Exports, rank: int, phase: str
) -> None:
    with started_for(phase, exports(3)) as job:
        victim, others = job.rank(rank), [job.rank(other) for other in (1, 2) if other != rank]
        text = reach(job, phase)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        code, rest, said = job.end(within=20)
        assert time.monotonic() - killed < LOST_SECONDS
        assert code == LOST, said
        assert said.count("error[") == 1
        assert f"stage {rank} (" in said
        assert "killed by signal 9" in said
        assert bool(text + rest) == (phase == WRITING)
        assert not any(map(is_alive, others))


@pytest.mark.alone
@pytest.mark.row("N9")
@pytest.mark.parametrize("phase", PHASES)
def test_when_the_driver_is_killed_its_workers_leave(exports: Exports, phase: str) -> None:
    num_stages = 3 if phase == WRITING else 2
    with started_for(phase, exports(num_stages)) as job:
        workers = [job.rank(number) for number in range(1, num_stages)]
        reach(job, phase)
        os.kill(job.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, workers)), seconds=5)


@pytest.mark.alone
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_everybody_in_a_second_and_keeps_the_text(exports: Exports, phase: str) -> None:
    with started_for(phase, exports(2)) as job:
        worker = job.rank(1)
        text = reach(job, phase)
        pressed = time.monotonic()
        os.kill(job.pid, signal.SIGINT)
        code, rest, said = job.end(within=20)
        assert time.monotonic() - pressed < INTERRUPTED_SECONDS
        assert code == INTERRUPTED, said
        assert "Traceback" not in said
        assert bool(text + rest) == (phase == WRITING)
        wait_for(lambda: not is_alive(worker), seconds=1)  # the kernel ends one that is still starting


@pytest.mark.alone
def test_ctrl_c_at_a_worker_ends_everybody_too(exports: Exports) -> None:
    with started(*generate(exports(2), "-c", 1024)) as job:
        worker = job.rank(1)
        job.first_text()
        os.kill(worker, signal.SIGINT)
        code, _, said = job.end(within=5)
        assert code == INTERRUPTED, said
        assert "stage 1 (" in said


@pytest.mark.row("P21")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_is_told_to_end_says_by_what(
    exports: Exports, nursery: Nursery, tmp_path: Path, number: signal.Signals
) -> None:
    line = generate(exports(2), "--listen", f"unix:{tmp_path / 'socket'}", "-c", 1024)
    words = ["llamarun", *(word for word in line if word != "--processes")]
    job = nursery.start(words, output=tmp_path / "driver")
    wait_for(lambda: "listening on" in job.said)
    join = ["runtime.worker", exports(2), "--rank", 1, "--join", f"unix:{tmp_path / 'socket'}"]
    worker = nursery.start(join, output=tmp_path / "worker")
    wait_for(lambda: job.text)
    os.kill(worker.pid, number)
    code, _ = job.end(within=20)
    assert code == LOST, job.said
    assert f"stage 1 (layers 4-6, head), process {worker.pid}" in job.said
    assert f"was ended by {number.name}" in job.said
    assert worker.end(within=5)[0] == 128 + number


@pytest.mark.row("N6")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_for_a_while_costs_nothing_but_time(
    exports: Exports, greedy_text: Callable[[int], bytes], rank: int
) -> None:
    """Before the timeout."""
    options = ["-c", 1024, "--temp", 0, "--heartbeat-timeout", 20]
    with started(*generate(exports(2), *options, tokens=100), is_held=True) as job:
        victim = job.rank(rank)
        first = job.first_text()
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: psutil.Process(victim).status() == psutil.STATUS_STOPPED)
        first += job.let_go()
        with pytest.raises(AssertionError):
            wait_for(lambda: job.process.poll() is not None, seconds=2)
        os.kill(victim, signal.SIGCONT)
        code, rest, said = job.end(within=60)
    assert code == 0, said
    assert first + rest == greedy_text(100)


@pytest.mark.alone
@pytest.mark.row("N6")
def test_a_worker_that_stands_still_for_too_long_is_lost(exports: Exports) -> None:
    """After the timeout. A stopped process keeps its connections open."""
    with started(*generate(exports(3), "-c", 1024, "--heartbeat-timeout", 5)) as job:
        victim, other = job.rank(1), job.rank(2)
        job.first_text()
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        code, _, said = job.end(within=40)
        assert time.monotonic() - stopped < 5 + 2
        assert code == LOST, said
        assert "stage 1 (" in said
        assert "no sign of life for 5 s" in said
        assert not is_alive(victim)
        assert not is_alive(other)


@pytest.mark.row("N14")
def test_a_worker_without_memory_ends_the_run_with_its_last_error(exports: Exports) -> None:
    """On the reference path caches grow; the kernels' have all their room from the beginning."""
    with started(*generate(exports(2), "-c", 1024, "--speed", "reference", "--dtype", "fp32"), is_held=True) as job:
        worker = psutil.Process(job.rank(1))
        job.first_text()
        room = worker.memory_info().vms + (1 << 20)  # stacks grow, too
        worker.rlimit(psutil.RLIMIT_AS, (room, room))
        code, _, said = job.end(within=60)
    assert code == LOST, said
    assert "stage 1 (" in said
    assert "memory" in said


@pytest.mark.alone
@pytest.mark.row("N13")
def test_a_local_job_listens_on_nothing_but_loopback_and_leaves_nothing_behind(exports: Exports) -> None:
    """No store, no control port; only gloo's own sockets, bound to 127.0.0.1."""
    before = set(Path("/tmp").iterdir())
    with started(*generate(exports(2), "-c", 1024)) as job:
        pids = [job.pid, job.rank(1)]
        job.first_text()
        listening = [
            c.laddr for pid in pids for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"
        ]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert len(listening) == len(pids)
        os.kill(job.pid, signal.SIGTERM)
        assert job.end(within=20)[0] == 128 + signal.SIGTERM
    assert not {path for path in set(Path("/tmp").iterdir()) - before if "llama" in path.name}


@pytest.mark.row("N15", "N17")
def test_short_jobs_end_in_order_one_right_after_the_other(exports: Exports) -> None:
    """Every token arrives, every worker leaves by itself."""
    texts = set()
    for _ in range(2):
        with started(*generate(exports(2), "--temp", 0, tokens=2), is_held=True, room=0) as job:
            worker = psutil.Process(job.rank(1))
            code, text, said = job.end(within=60)
            assert code == 0, said
            assert not worker.is_running()
            texts.add(text)
    assert len(texts) == 1
    assert len(texts.pop()) > 2  # the first byte is none of it


@pytest.mark.row("R14")
def test_a_reader_that_goes_away_ends_the_job(exports: Exports) -> None:
    with started(*generate(exports(2), "-c", 1024)) as job:
        worker = job.rank(1)
        job.first_text()
        job.stdout.close()
        assert job.process.wait(timeout=20) == 141
        assert not is_alive(worker)
