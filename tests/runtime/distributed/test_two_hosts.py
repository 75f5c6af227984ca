"""Two hosts: network namespaces of this machine with a cable between them. Skipped where they may not be made."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import generate, started
from test_joining import address_of, make_key

LOST = 7
Exports = Callable[[int], Path]
SHAPES = {
    "plain": None,
    "100 Mbit/s": "tbf rate 100mbit burst 64kb latency 50ms",
    "10 Mbit/s, 200 ms, 5 % loss": "netem rate 10mbit delay 200ms loss 5%",
}


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True, slots=True)
class Cable:
    """Two namespaces; `hosts` are their names, the first has 10.77.0.1."""

    hosts: tuple[str, str]

    def shape(self, rule: str | None) -> None:
        for host in self.hosts if rule else ():
            words = ["tc", "-n", host, "qdisc", "add", "dev", "cable", "root", *str(rule).split()]
            if subprocess.run(words, capture_output=True, timeout=20).returncode:
                pytest.skip(f"this kernel has no {words[8]}")

    def cut(self) -> None:
        ip("-n", self.hosts[0], "link", "set", "cable", "down")


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    made = Cable(("llamarun-a", "llamarun-b"))
    try:
        for host in made.hosts:
            ip("netns", "add", host)
        first, second = made.hosts
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for number, host in enumerate(made.hosts, start=1):
            ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    finally:
        for host in made.hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=20)


def arguments(folder: Path, key: Path, *options: object, tokens: int) -> list[object]:
    network = ["--listen", "10.77.0.1:0", "--key-file", key, "--trusted-network", "--temp", 0, "-c", 1024]
    return [word for word in generate(folder, *network, *options, tokens=tokens) if word != "--processes"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_over_two_hosts_writes_the_text_of_one_process(
    exports: Exports, cable: Cable, tmp_path: Path, shape: str
) -> None:
    """Rows N8 and N16: a slow link takes long and is not taken for a lost one."""
    cable.shape(SHAPES[shape])
    folder, key = exports(2), make_key(tmp_path / "key", "correct horse battery")
    alone = [word for word in generate(folder, "--temp", 0, "-c", 1024, tokens=8) if word != "--processes"]
    with started(*alone) as job:
        text = job.end(within=60)[1]
    with started(*arguments(folder, key, "--heartbeat-timeout", 20, tokens=8), host=cable.hosts[0]) as job:
        join = [folder, "--rank", 1, "--join", address_of(job), "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            code, out, said = job.end(within=120)
            assert (code, out) == (0, text), said
            assert worker.end(within=20)[0] == 0


def test_a_cut_cable_ends_both_hosts_within_the_heartbeat_timeout(
    exports: Exports, cable: Cable, tmp_path: Path
) -> None:
    """Row N7."""
    folder, key = exports(2), make_key(tmp_path / "key", "correct horse battery")
    with started(*arguments(folder, key, "--heartbeat-timeout", 10, tokens=900), host=cable.hosts[0]) as job:
        join = [folder, "--rank", 1, "--join", address_of(job), "--key-file", key]
        with started(*join, module="runtime.worker", host=cable.hosts[1]) as worker:
            assert job.first_text()
            cable.cut()
            cut = time.monotonic()
            for process, word in ((job, "stage 1 ("), (worker, "the driver")):
                code, _, said = process.end(within=40)
                assert code == LOST, said
                assert word in said
                assert "no sign of life for 10 s" in said
            assert time.monotonic() - cut < 10 + 4
