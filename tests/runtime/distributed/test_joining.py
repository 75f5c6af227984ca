"""Who may join a job over the network, who may not, and what a job does about strangers."""

import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, generate, started, wait_for

from plans.errors import PeerError
from runtime.distributed.control.acceptor import MAX_STRANGERS, Acceptor
from runtime.distributed.control.address import listen, parse_address
from runtime.distributed.control.channel import receive_frame, send_frame
from runtime.distributed.control.keys import introduce, welcome
from tests.conftest import RunCommand
from tests.runtime.distributed.nursery import Nursery

LOST, MACHINE, USAGE = 7, 6, 2
Exports = Callable[[int], Path]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key", "correct horse battery")


def make_key(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def address_of(job: Job) -> str:
    """Read where a driver listens from what it says."""
    said = b""
    while not (found := re.search(rb"listening on (\S+) for", said)):
        line = job.stderr.readline()
        assert line, said
        said += line
    return found[1].decode()


def driver(folder: Path, key: Path, *options: object, listen: str = "127.0.0.1:0", tokens: int = 6) -> Any:
    options = ("--listen", listen, "--key-file", key, "--temp", 0, "-c", 1024, *options)
    return started(*[word for word in generate(folder, *options, tokens=tokens) if word != "--processes"])


def worker(folder: Path, address: str, key: Path, rank: int, *options: object) -> Any:
    join = ["--join", address, "--key-file", key, "--join-timeout", 20, *options]
    return started(folder, "--rank", rank, *join, module="runtime.worker")


@pytest.fixture(scope="session")
def text(greedy_text: Callable[[int], bytes]) -> bytes:
    """What one process writes."""
    return greedy_text(6)


@pytest.mark.row("N16")
def test_workers_from_elsewhere_join_over_the_other_internet_protocol_too(
    exports: Exports, key: Path, text: bytes
) -> None:
    with driver(exports(2), key, listen="[::1]:0") as job, worker(exports(2), address_of(job), key, 1) as member:
        code, out, said = job.end(within=90)
        assert (code, out) == (0, text), said
        assert member.end(within=20)[0] == 0


@pytest.mark.row("N2", "N11", "N12")
def test_workers_from_elsewhere_join_and_strangers_do_no_harm(
    exports: Exports, key: Path, text: bytes, tmp_path: Path
) -> None:
    folder = exports(3)
    wrong = make_key(tmp_path / "wrong", "quite another secret")
    with driver(folder, key) as job, ExitStack() as stack:
        address = address_of(job)
        strangers = [stranger(address, says) for says in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(65536), b"\0")]
        reflect(address)
        with worker(folder, address, wrong, 1) as refused:
            code, _, said = refused.end(within=30)
            assert (code, "key" in said) == (LOST, True)
        first = stack.enter_context(worker(folder, address, key, 1))
        with worker(folder, address, key, 3) as extra:
            code, _, said = extra.end(within=30)
            assert (code, "there is no stage 3" in said) == (USAGE, True), said
        # Two for one place, and the job cannot begin before the last one is there: whoever comes later is refused.
        again = stack.enter_context(worker(folder, address, key, 1))
        late = wait_for(lambda: next((job for job in (first, again) if job.process.poll() is not None), None))
        code, _, said = late.end(within=30)
        assert (code, "rank 1 is taken" in said) == (LOST, True), said
        second = stack.enter_context(worker(folder, address, key, 2))
        code, out, said = job.end(within=90)
        assert (code, out) == (0, text), said
        assert said.count("sent away a connection") == 1  # once per address
        taken = again if late is first else first
        assert [member.end(within=20)[0] for member in (taken, second)] == [0, 0]
        for connection in strangers:
            connection.close()


def stranger(address: str, says: bytes) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=20)
    connection.sendall(says)
    return connection


def reflect(address: str) -> None:
    """Send the driver its own challenge back, as a proof."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=20) as connection:
        greeting = receive_frame(connection, max_bytes=4096)
        send_frame(connection, greeting or b"")
        assert receive_frame(connection, max_bytes=4096) is None


@pytest.mark.row("N3")
def test_a_worker_of_another_export_is_refused_and_ends_the_job_with_both_ids(exports: Exports, key: Path) -> None:
    ids = [re.search(r'"export_id": "(\w+)"', (exports(n) / "manifest.json").read_text())[1] for n in (2, 3)]
    with driver(exports(3), key) as job, worker(exports(2), address_of(job), key, 1) as other:
        for member in (job, other):
            code, _, said = member.end(within=30)
            assert code == LOST, said
            assert all(id_ in said for id_ in ids), said


@pytest.mark.alone
@pytest.mark.row("N1")
def test_a_worker_that_never_joins_is_named_on_every_rank(exports: Exports, key: Path) -> None:
    with driver(exports(3), key, "--join-timeout", 6) as job, worker(exports(3), address_of(job), key, 1) as member:
        for process in (job, member):
            code, _, said = process.end(within=40)
            assert code == LOST, said
            assert "stage 2 (layer 6, head) did not join within 6 s" in said


def refuse(exports: Exports, run: RunCommand, *options: object) -> tuple[int, str]:
    done = run("llamarun", "generate", exports(2), "-p", "x", "-n", 1, *options)
    assert "Traceback" not in done.err
    return done.code, done.err


@pytest.mark.row("N4")
def test_a_port_that_is_taken_or_an_address_of_another_machine_is_named(
    exports: Exports, run_command: RunCommand, key: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = refuse(exports, run_command, "--listen", address, "--key-file", key)
        assert (code, address in said, "port 0" in said) == (MACHINE, True, True)
    code, said = refuse(exports, run_command, "--listen", "192.0.2.1:0", "--key-file", key, "--trusted-network")
    assert (code, "192.0.2.1" in said) == (MACHINE, True)


@pytest.mark.row("P12")
def test_a_socket_file_takes_the_name_of_nothing_but_a_socket_that_was_left_behind(
    exports: Exports, run_command: RunCommand, tmp_path: Path
) -> None:
    file, link, live = (tmp_path / name for name in ("file", "link", "live"))
    file.write_text("precious")
    link.symlink_to(file)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(live))
        other.listen()
        for path in (file, link, live, tmp_path):
            code, said = refuse(exports, run_command, "--listen", f"unix:{path}")
            assert (code, "cannot listen" in said, str(path) in said) == (MACHINE, True, True), said
    assert file.read_text() == "precious"
    assert link.is_symlink()
    # Nobody listens at it any more: it is what a killed run leaves behind.
    listener, _ = listen(parse_address(f"unix:{live}", where="--listen"))
    Acceptor(listener, key=b"", admit=lambda _channel: None, warn=lambda _text: None).close()
    assert not live.exists()


@pytest.mark.row("P13")
def test_silent_strangers_keep_no_worker_out(exports: Exports, key: Path, nursery: Nursery, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = generate(exports(2), "--listen", address, "--key-file", key, "-c", 1024, tokens=3)
    words = ["llamarun", *(word for word in line if word != "--processes")]
    job = nursery.start(words, output=tmp_path / "driver")
    wait_for(lambda: "listening on" in job.said)
    with ExitStack() as stack:
        for _ in range(3 * MAX_STRANGERS):
            stack.enter_context(stranger(address, b""))
        join = ["runtime.worker", exports(2), "--rank", 1, "--join", address, "--key-file", key]
        worker = nursery.start(join, output=tmp_path / "worker")
        assert [process.end(within=60)[0] for process in (job, worker)] == [0, 0], job.said + worker.said


@pytest.mark.row("N13")
def test_a_network_must_be_called_trusted(exports: Exports, run_command: RunCommand, key: Path) -> None:
    code, said = refuse(exports, run_command, "--listen", "0.0.0.0:0", "--key-file", key)
    assert (code, "--trusted-network" in said, "encrypts" in said) == (MACHINE, True, True)


@pytest.mark.row("N12")
@pytest.mark.parametrize(
    ("text_of_key", "mode", "says"),
    [("correct horse battery", 0o644, "0644"), ("", 0o600, "0 bytes"), ("short", 0o600, "5 bytes")],
)
def test_a_key_that_is_none_is_refused(
    exports: Exports, run_command: RunCommand, tmp_path: Path, text_of_key: str, mode: int, says: str
) -> None:
    bad = make_key(tmp_path / "bad", text_of_key, mode)
    code, said = refuse(exports, run_command, "--listen", "127.0.0.1:0", "--key-file", bad)
    assert (code, says in said) == (MACHINE, True), said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "127.0.0.1:0"], "--key-file"),
        (["--listen", "here"], "no address"),
        (["--listen", "127.0.0.1:99999"], "no address"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    exports: Exports, run_command: RunCommand, options: list[str], says: str
) -> None:
    code, said = refuse(exports, run_command, *options)
    assert (code, says in said) == (USAGE, True), said


@pytest.mark.row("N12")
def test_a_proof_that_was_recorded_does_not_work_again() -> None:
    """Every challenge is fresh."""
    key, said = b"k" * 16, []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = threading.Thread(target=introduce, args=(Recorder(theirs, said), key), kwargs={"name": "x"})
        helper.start()
        welcome(ours, key)
        helper.join()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(said))
        with pytest.raises(PeerError, match="another key"):
            welcome(ours, key)


class Recorder:
    """A connection that remembers what was sent."""

    def __init__(self, connection: socket.socket, said: list[bytes]) -> None:
        self._connection, self._said = connection, said

    def sendall(self, data: bytes) -> None:
        self._said.append(data)
        self._connection.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_torchrun_starts_the_same_job(exports: Exports, text: bytes) -> None:
    options = ["-p", "def __init__(self, ", "-n", 6, "--temp", 0, "--ignore-eos", "-c", 1024, "-q"]
    torchrun = ["--standalone", "--nproc-per-node", 2, "-m", "runtime.worker", exports(2)]
    with started(*torchrun, "generate", *options, module="torch.distributed.run") as job:
        code, out, said = job.end(within=120)
    assert (code, out) == (0, text), said
