"""Links measured over loopback with real processes, strangers included."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from plans.cluster import Cluster, Host
from tests.conftest import RunCommand
from tests.planner.cases import cluster, device


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[int, "subprocess.Popen[str]"]]:
    """A process that serves, and its port."""
    command = [sys.executable, "-m", "planner.cli", "links", "--serve", "--listen", "127.0.0.1:0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"listening on 127.0.0.1:(\d+)", line)
        assert found, line
        yield int(found[1]), process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def key_in(folder: Path, text: str = "correct horse battery staple", *, mode: int = 0o600) -> Path:
    path = folder / f"key-{len(text)}-{mode:o}"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_both_directions_are_measured_and_go_into_the_cluster_file(run_command: RunCommand, tmp_path: Path) -> None:
    path, key = tmp_path / "cluster.json", key_in(tmp_path)
    hosts = (Host(name="here"), Host(name="box2"))
    path.write_text(cluster(device("cpu", host="here"), device("far", host="box2"), hosts=hosts).to_json())
    with serving("--times", 1, "--key-file", key) as (port, process):
        options = ("--key-file", key, "--from", "here", "--cluster", path, "-o", path)
        done = run_command("llamaplan", "links", f"box2=127.0.0.1:{port}", *options)
        assert done.code == 0, done.err
        assert process.wait(timeout=20) == 0
    links = Cluster.read(path).links
    assert [(link.from_, link.to) for link in links] == [("here", "box2"), ("box2", "here")]
    assert all(link.bandwidth_bytes_per_second > 1e6 and 0 < link.latency_seconds < 1 for link in links)


def test_without_a_cluster_the_links_are_printed(run_command: RunCommand) -> None:
    with serving("--times", 1) as (port, _process):
        done = run_command("llamaplan", "links", f"127.0.0.1:{port}", "--json", "-q")
    assert (done.code, done.err) == (0, "")
    assert [link["from"] for link in json.loads(done.out)] == ["local", "127.0.0.1"]


def test_strangers_are_turned_away_and_the_next_peer_is_served(run_command: RunCommand, tmp_path: Path) -> None:
    key, other = key_in(tmp_path), key_in(tmp_path, "another secret of some length")
    with serving("--times", 1, "--key-file", key) as (port, process):
        for noise in (b"GET / HTTP/1.1\r\n\r\n" + bytes(80), os.urandom(65536)):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(noise)
        assert run_command("llamaplan", "links", f"127.0.0.1:{port}", "--key-file", other).code == 7
        assert run_command("llamaplan", "links", f"127.0.0.1:{port}").code == 7
        assert run_command("llamaplan", "links", f"127.0.0.1:{port}", "--key-file", key).code == 0
        assert process.wait(timeout=20) == 0


def test_requests_beyond_the_limits_end_the_connection() -> None:
    from planner.measure.links import MAX_MESSAGE_BYTES, RECEIVE, REQUEST, introduce

    with serving() as (port, _process), socket.create_connection(("127.0.0.1", port)) as connection:
        introduce(connection, b"", name="test")
        connection.sendall(REQUEST.pack(RECEIVE, MAX_MESSAGE_BYTES + 1))
        assert connection.recv(1) == b""


def test_a_silent_peer_is_given_up(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.distributed.control.keys.HANDSHAKE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = run_command("llamaplan", "links", f"127.0.0.1:{silent.getsockname()[1]}")
    assert (done.code, "did not answer in time" in done.err) == (7, True), done.err


def test_nobody_there_is_a_lost_peer_and_a_taken_port_the_machine(run_command: RunCommand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command("llamaplan", "links", "--serve", "--listen", f"127.0.0.1:{port}")
        assert (done.code, f"127.0.0.1:{port}" in done.err) == (6, True), done.err
    assert run_command("llamaplan", "links", f"127.0.0.1:{port}").code == 7


def test_bad_requests_are_refused(run_command: RunCommand, tmp_path: Path) -> None:
    cases = [
        ([], 2, "either --serve or"),
        (["--serve", "box"], 2, "either --serve or"),
        (["a b"], 2, "is no address"),
        (["box:70000"], 2, "below 65536"),
        (["--serve", "--listen", "0.0.0.0:0"], 2, "--key-file"),
        (["box", "-o", "x.json"], 2, "needs --cluster"),
        (["box", "--key-file", key_in(tmp_path, mode=0o644)], 6, "chmod 600"),
        (["box", "--key-file", key_in(tmp_path, "short")], 6, "at least 16"),
        (["box", "--key-file", tmp_path / "none"], 3, "no such file"),
    ]
    for arguments, code, says in cases:
        done = run_command("llamaplan", "links", *arguments)
        assert (done.code, says in done.err) == (code, True), done.err
