"""The data between two hosts is cut while their control connection lives: everybody ends, and both ends are named.

All jobs run side by side, each on two hosts of its own: what takes time is waiting.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_joining import make_key
from wires import Rule, Wire, is_data, is_large, lossy, wires

from tests.runtime.distributed.nursery import Child, Nursery

LOST = 7
HEARTBEAT_SECONDS, JOIN_SECONDS = 6, 10
CONTRACT_SECONDS = 2
PROMPT = "x = 1\n" * 60
Exports = Callable[[int], Path]


@dataclass(slots=True)
class Job:
    """Two processes and what lies between them."""

    wire: Wire
    driver: Child
    worker: Child


def is_large_data(packet: bytes) -> bool:
    return is_data(packet) and is_large(packet)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is lost after so many bytes of data, and the driver's options."""

    loses: Rule
    after_bytes: int
    options: tuple[object, ...] = ()


DECODING = ("-p", "x", "-n", 900)
READING = ("-p", PROMPT, "-n", 9, "--prefill-chunk", 2)
CUTS = {
    "a firewall from the start": Cut(is_data, 0, (*DECODING, "--join-timeout", JOIN_SECONDS)),
    "an MTU black hole from the start": Cut(is_large_data, 0, ("-p", PROMPT, "-n", 9)),
    "a firewall in a prompt": Cut(is_data, 20_000, READING),
    "a firewall in decoding": Cut(is_data, 60_000, DECODING),
    "an MTU black hole in decoding, with --restart": Cut(is_large_data, 60_000, (*DECODING, "--restart")),
}
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "64 kbit/s": {"bytes_per_second": 8e3},
    "10 Mbit/s, 200 ms, 5 % loss": {"bytes_per_second": 1.25e6, "delay_seconds": 0.1, "loses": lossy(0.05)},
}


@pytest.fixture(scope="module")
def jobs(exports: Exports, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All of them, running."""
    folder = tmp_path_factory.mktemp("silent")
    key = make_key(folder / "key", "correct horse battery")
    with wires(len(CUTS) + len(SHAPES)) as made:
        free = iter(made)

        def start(*options: object, **shape: object) -> Job:
            wire = next(free)
            for name, value in shape.items():
                setattr(wire, name, value)
            driver = ["llamarun", "generate", exports(2), "--listen", wire.address, "--key-file", key]
            driver += ["--trusted-network", "--threads", 1, "--temp", 0, "-c", 1024, "--ignore-eos", *options]
            driver += ["--heartbeat-timeout", HEARTBEAT_SECONDS]
            worker = ["runtime.worker", exports(2), "--rank", 1, "--join", wire.address, "--key-file", key]
            return Job(
                wire,
                nursery.start(driver, host=wire.hosts[0], output=folder / f"driver{wire.number}"),
                nursery.start(worker, host=wire.hosts[1], output=folder / f"worker{wire.number}"),
            )

        cut = {n: start(*c.options, loses=c.loses, after_bytes=c.after_bytes) for n, c in CUTS.items()}
        yield cut | {name: start("-p", PROMPT, "-n", 4, **shape) for name, shape in SHAPES.items()}


@pytest.mark.row("P17")
@pytest.mark.parametrize("name", CUTS)
def test_a_silent_link_ends_everybody_and_both_ends_are_named(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    limit = (JOIN_SECONDS if "--join-timeout" in CUTS[name].options else HEARTBEAT_SECONDS) + CONTRACT_SECONDS
    for process in (job.driver, job.worker):
        code, ended_at = process.end(within=90)
        assert code == LOST, process.said
        assert job.wire.lost_at is not None
        assert ended_at - job.wire.lost_at < limit, process.said
        assert "stage 0 (" in process.said
        assert "stage 1 (" in process.said
        assert "control connections live" in process.said
    assert job.driver.said.count("error[E-LINK]") == 1


@pytest.mark.row("P17", "N8")
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_slow_link_progress_counts_and_not_how_long_it_takes(jobs: dict[str, Job], name: str) -> None:
    """The prompt alone takes longer than the heartbeat timeout at 64 kbit/s."""
    for process in (jobs[name].driver, jobs[name].worker):
        code, _ = process.end(within=120)
        assert code == 0, process.said
    jobs["plain"].driver.end(within=120)
    assert jobs[name].driver.text == jobs["plain"].driver.text
