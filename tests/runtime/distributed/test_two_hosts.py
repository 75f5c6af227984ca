"""Two hosts: network namespaces of this machine with a cable between them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import generate, started
from networks import Cable, cables
from test_joining import make_key

LOST = 7
Exports = Callable[[int], Path]
SHAPES = {
    "plain": None,
    "100 Mbit/s": "tbf rate 100mbit burst 64kb latency 50ms",
    "10 Mbit/s, 200 ms, 5 % loss": "netem rate 10mbit delay 200ms loss 5%",
}


@pytest.fixture
def cable() -> Iterator[Cable]:
    with cables(("llamarun-a", "llamarun-b")) as made:
        yield made[0]


def arguments(folder: Path, key: Path, cable: Cable, *options: object, tokens: int) -> list[object]:
    network = ["--listen", cable.address, "--key-file", key, "--trusted-network", "--temp", 0, "-c", 1024]
    return [word for word in generate(folder, *network, *options, tokens=tokens) if word != "--processes"]


@pytest.mark.row("N8", "N16")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_over_two_hosts_writes_the_text_of_one_process(
    exports: Exports, greedy_text: Callable[[int], bytes], cable: Cable, tmp_path: Path, shape: str
) -> None:
    """A slow link takes long and is not taken for a lost one."""
    cable.shape(SHAPES[shape])
    folder, key = exports(2), make_key(tmp_path / "key", "correct horse battery")
    with started(*arguments(folder, key, cable, "--heartbeat-timeout", 20, tokens=8), host=cable.hosts[0]) as job:
        join = [folder, "--rank", 1, "--join", cable.address, "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            code, out, said = job.end(within=120)
            assert (code, out) == (0, greedy_text(8)), said
            assert worker.end(within=20)[0] == 0


@pytest.mark.alone
@pytest.mark.row("N7")
def test_a_cut_cable_ends_both_hosts_within_the_heartbeat_timeout(
    exports: Exports, cable: Cable, tmp_path: Path
) -> None:
    folder, key = exports(2), make_key(tmp_path / "key", "correct horse battery")
    with started(*arguments(folder, key, cable, "--heartbeat-timeout", 5, tokens=900), host=cable.hosts[0]) as job:
        join = [folder, "--rank", 1, "--join", cable.address, "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            assert job.first_text()
            cable.cut()
            cut = time.monotonic()
            for process, word in ((job, "stage 1 ("), (worker, "the driver")):
                code, _, said = process.end(within=40)
                assert code == LOST, said
                assert word in said
                assert "no sign of life for 5 s" in said
            assert time.monotonic() - cut < 5 + 2
