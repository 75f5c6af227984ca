"""What clients do wrong, and what happens to a server."""

import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from servers import KEY, LONG, Server, events_of, read_all, serving

from exporter import export
from tests.conftest import RunCommand
from tests.exporter.export_helpers import make_plan

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.row("S1")
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_slots(server: Server, *, streams: bool) -> None:
    server.wait_until(lambda: server.is_idle)
    before = server.metric("generation_tokens_total")
    with server.send(COMPLETIONS, {"prompt": "x", "stream": streams, **LONG}) as connection:
        if streams:
            assert connection.recv(10)
        server.wait_until(lambda: server.metric("generation_tokens_total") > before)
    server.wait_until(lambda: server.is_idle)
    assert server.metric("generation_tokens_total") - before < 12 * 900


@pytest.mark.row("S2")
def test_a_client_that_leaves_while_it_waits_never_starts(server: Server) -> None:
    server.wait_until(lambda: server.is_idle)
    with server.send(COMPLETIONS, {"prompt": "x", **LONG}):
        server.wait_until(lambda: server.metric("requests_waiting") == 8)
        prompts = server.metric("prompt_tokens_total")
        with server.send(COMPLETIONS, {"prompt": [5] * 300, "max_tokens": 1}):
            server.wait_until(lambda: server.metric("requests_waiting") == 9)
        server.wait_until(lambda: server.metric("requests_waiting") <= 8)
        assert server.metric("prompt_tokens_total") - prompts < 300
    server.wait_until(lambda: server.is_idle)


@pytest.mark.row("S3")
def test_a_client_that_leaves_while_its_prompt_is_read_is_forgotten(server: Server) -> None:
    server.wait_until(lambda: server.is_idle)
    prompts = server.metric("prompt_tokens_total")
    with server.send(CHAT, {"messages": [{"role": "user", "content": "loop"}], "max_tokens": 1}):
        pass
    server.wait_until(lambda: f"POST {CHAT} left" in server.child.said)
    assert server.metric("prompt_tokens_total") == prompts


@pytest.mark.row("S4")
def test_a_client_that_reads_nothing_holds_nobody_up(server: Server) -> None:
    with server.send(COMPLETIONS, {"prompt": "x", "stream": True, "logprobs": 20, **LONG, "n": 2}):
        assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 3})[0] == 200
    server.wait_until(lambda: server.is_idle)


IMPATIENT = """
import socket, sys
from runtime.cli import main
from runtime.serve import app

def create_server(*place, **options):
    listener = make_server(*place, **options)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
    return listener

make_server, socket.create_server = socket.create_server, create_server
app.WRITE_SECONDS = 0.2
sys.argv[:2] = ["llamarun"]
main()
"""


@pytest.mark.row("S4")
def test_a_client_that_reads_nothing_is_left(tmp_path: Path, shipped: Path) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    program = ("python", tmp_path / "impatient.py")
    with (
        serving(shipped, tmp_path / "out", program=program) as server,
        server.send(COMPLETIONS, {"prompt": "x", "stream": True, "logprobs": 20, **LONG}) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        name = connection.getsockname()
        server.wait_until(lambda: f"POST {COMPLETIONS} 200" in server.child.said)
        server.wait_until(lambda: not _is_connected(server, name))
        server.wait_until(lambda: server.is_idle)
        assert server.metric('requests_finished_total{reason="interrupted"}') > 0
        assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 3})[0] == 200


def _is_connected(server: Server, name: tuple[str, int]) -> bool:
    """Whether the server still has its end of a connection."""
    return any(found.raddr == name for found in psutil.Process(server.child.pid).net_connections("tcp"))


@pytest.mark.row("S5")
def test_a_full_queue_says_when_to_come_again(server: Server) -> None:
    server.wait_until(lambda: server.is_idle)
    with ExitStack() as waiting:  # four run, a thousand wait
        for num in (*[126] * 7, 122):
            waiting.enter_context(server.send(COMPLETIONS, {"prompt": "x", **LONG, "n": num}))
            server.wait_until(lambda: server.metric("requests_running") == 4)  # before there are more than may wait
        server.wait_until(lambda: server.metric("requests_waiting") == 1000)
        status, headers, text = server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 1})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(text)["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="python-llama", prompt="x", max_tokens=1)
    server.wait_until(lambda: server.is_idle)


@pytest.mark.row("S6")
@pytest.mark.parametrize("is_stated", [True, False])
def test_a_body_over_the_limit_is_not_read(server: Server, *, is_stated: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        length = f"Content-Length: {9 << 20}" if is_stated else "Transfer-Encoding: chunked"
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        if not is_stated:
            chunk = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
            threading.Thread(target=lambda: _send_all(connection, chunk, times=9), daemon=True).start()
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def _send_all(connection: socket.socket, data: bytes, *, times: int) -> None:
    try:
        for _ in range(times):
            connection.sendall(data)
    except OSError:
        return  # it was told


@pytest.mark.row("S7", "S10")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"prompt": "x"',
        b"[1]",
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Server, body: bytes) -> None:
    assert server.refused(COMPLETIONS, body) == (400, "invalid_json")


@pytest.mark.row("S8", "S9")
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("max_tokens", "3", "invalid_value"),
        ("max_tokens", -1, "invalid_value"),
        ("temperature", True, "invalid_value"),
        ("top_p", 0, "invalid_value"),
        ("n", 0, "invalid_value"),
        ("stop", [""], "invalid_value"),
        ("logit_bias", {"x": 1}, "invalid_value"),
        ("logit_bias", {"999999": 1}, "invalid_value"),
        ("top_k", 10**6, "invalid_value"),
        ("prompt", [99999999], "invalid_request"),
        ("max_token", 3, "unknown_field"),
        ("<script>", 3, "unknown_field"),
        ("suffix", "x", "unsupported"),
        ("response_format", {"type": "json_object"}, "unsupported"),
        ("tools", [{"type": "function"}], "unsupported"),
        ("best_of", 4, "unsupported"),
    ],
)
def test_a_field_that_is_wrong_or_not_done_is_named(server: Server, field: str, value: Any, code: str) -> None:
    body = {"prompt": "x", "max_tokens": 1} | {field: value}
    assert server.refused(COMPLETIONS, body) == (400, code)
    text = server.ask(COMPLETIONS, body)[2]
    assert (field in text) is (field != "<script>")


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    neutral = {"tools": None, "response_format": {"type": "text"}, "best_of": 1, "user": "me", "logprobs": None}
    assert server.ask(COMPLETIONS, {"prompt": "x", "max_tokens": 1, **neutral})[0] == 200


@pytest.mark.row("S11", "S12")
@pytest.mark.parametrize(("length", "new"), [(1100, 1), (600, 500)])
def test_what_can_never_fit_is_refused_with_both_numbers(server: Server, length: int, new: int) -> None:
    body = {"prompt": [7] * length, "max_tokens": new}
    assert server.refused(COMPLETIONS, body) == (400, "context_length_exceeded")
    message = json.loads(server.ask(COMPLETIONS, body)[2])["error"]["message"]
    assert str(length) in message
    assert "1024" in message


@pytest.mark.row("S13", "S14")
@pytest.mark.parametrize("streams", [False, True])
def test_stops_and_characters_are_whole(server: Server, *, streams: bool) -> None:
    def text(**settings: Any) -> str:
        body = {"prompt": "def f(a, b):\n", "max_tokens": 40, "temperature": 0, "stream": streams, **settings}
        answer = server.ask(COMPLETIONS, body)[2]
        found = events_of(answer) if streams else [json.loads(answer)]
        return "".join(one["choices"][0]["text"] for one in found)

    plain = text()
    stop = plain[10:16]
    assert text(stop=stop) == plain[: plain.index(stop)]
    snowman = json.loads(server.ask("/tokenize", {"prompt": "\u2603"})[2])["tokens"][-3:]
    # One of the character's three bytes: said as what it is, once, and not lost.
    assert text(prompt=[5], logit_bias={str(snowman[0]): 100}, max_tokens=1) == "\ufffd"


@pytest.mark.row("S15")
def test_another_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="gpt-4", prompt="x")
    assert server.refused("/v1/nothing", {"prompt": "x"})[0] == 404
    assert server.refused(COMPLETIONS, None)[0] == 405


@pytest.mark.row("S18")
@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("", 403), ("localhost.evil.example", 403), ("[::1]", 200), ("localhost:80", 200)],
)
def test_another_host_is_refused(server: Server, host: str, status: int) -> None:
    assert server.ask("/v1/models", Host=host)[0] == status


@pytest.mark.row("S23")
@pytest.mark.parametrize("what", ["loop", "eat"])
def test_a_template_that_does_not_end_delays_nobody(server: Server, what: str) -> None:
    with ThreadPoolExecutor() as threads:
        bad = threads.submit(server.refused, CHAT, {"messages": [{"role": "user", "content": what}], "max_tokens": 1})
        good = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        assert server.ask(CHAT, good)[0] == 200
        assert server.ask(COMPLETIONS, {"prompt": [5], "max_tokens": 1})[0] == 200
        assert bad.result() == (400, "invalid_request")


@pytest.mark.row("S16", "S17")
def test_keys_and_origins_guard_every_path(tmp_path: Path, shipped: Path) -> None:
    (tmp_path / "keys").write_text("another key which is long\n".replace(" ", "-") + KEY.replace(" ", "-") + "\n")
    (tmp_path / "keys").chmod(0o600)
    options = ("--api-key-file", tmp_path / "keys", "--allow-origin", "https://friend.example")
    key = f"Bearer {KEY.replace(' ', '-')}"
    with serving(shipped, tmp_path / "out", *options) as server:
        for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
            assert server.refused(path, {}) == (401, "invalid_api_key")
            assert server.refused(path, {}, Authorization="Bearer x") == (401, "invalid_api_key")
            assert server.refused(path, {}, Authorization=key)[0] == 400
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert server.refused(path, None) == (401, "invalid_api_key")
        assert server.ask("/health")[0] == 200
        assert server.ask("/v1/models", Authorization=key)[0] == 200
        assert server.refused("/v1/models", None, Authorization=key, Origin="https://evil.example")[0] == 403
        assert server.refused("/v1/models", None, Authorization=key, Origin="null")[0] == 403
        _, headers, _ = server.ask("/v1/models", Authorization=key, Origin="https://friend.example")
        assert headers["access-control-allow-origin"] == "https://friend.example"
        assert server.ask(COMPLETIONS, method="OPTIONS", Origin="https://friend.example")[0] == 204


@pytest.mark.row("S19")
def test_an_open_address_needs_a_key(run_command: RunCommand, shipped: Path) -> None:
    found = run_command("llamarun", "serve", shipped, "--host", "0.0.0.0")
    assert found.code == 2
    assert "--api-key-file" in found.err


@pytest.mark.row("S22")
def test_a_first_signal_lets_running_requests_end(tmp_path: Path, shipped: Path) -> None:
    with serving(shipped, tmp_path / "out", "--drain", 3600) as server:
        body = {"prompt": "x", "stream": True, **LONG, "n": 1, "max_tokens": 300}
        with server.send(COMPLETIONS, body) as connection:
            assert connection.recv(10)
            server.child.process.send_signal(signal.SIGTERM)
            server.wait_until(lambda: "ending" in server.child.said)
            server.wait_until(lambda: server.ask("/health")[0] == 503)
            assert server.refused(COMPLETIONS, {"prompt": [5], "max_tokens": 1}) == (503, "shutting_down")
            text = read_all(connection)
            assert b'"finish_reason": "length"' in text
            assert b"[DONE]" in text
        assert server.child.end(within=60)[0] == 0


@pytest.mark.row("S22")
def test_a_second_signal_ends_at_once(tmp_path: Path, shipped: Path) -> None:
    with (
        serving(shipped, tmp_path / "out", "--drain", 3600) as server,
        server.send(COMPLETIONS, {"prompt": "x", "stream": True, **LONG, "n": 100}) as connection,
    ):
        assert connection.recv(10)
        server.child.process.send_signal(signal.SIGINT)
        server.wait_until(lambda: "ending" in server.child.said)
        server.child.process.send_signal(signal.SIGINT)
        text = read_all(connection)
        assert b"shutting_down" in text
        assert server.child.end(within=60)[0] == 0


@pytest.mark.row("S24")
def test_a_port_that_is_taken_is_said(run_command: RunCommand, shipped: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = run_command("llamarun", "serve", shipped, "--port", port, "--no-verify", "--speed", "reference")
    assert found.code == 6
    assert f"127.0.0.1:{port}" in found.err


@pytest.fixture
def two_stages(shipped: Path, tmp_path: Path) -> Path:
    """An export of two stages on the CPU."""
    plan = make_plan(shipped, [4, 3], devices=["cpu#0", "cpu#1"])
    export(plan, model=shipped, output=tmp_path / "shards")
    return tmp_path / "shards"


def worker_of(server: Server) -> psutil.Process:
    """The process of the second stage."""
    return next(child for child in psutil.Process(server.child.pid).children() if "llamarun 1" in child.name())


@pytest.mark.row("S20")
def test_a_lost_worker_ends_the_server_and_every_stream_says_so(tmp_path: Path, two_stages: Path) -> None:
    with (
        serving(two_stages, tmp_path / "out", "--processes", "--ctx-size", 1024) as server,
        server.send(COMPLETIONS, {"prompt": "x", "stream": True, **LONG}) as connection,
    ):
        assert connection.recv(10)
        worker_of(server).kill()
        text = read_all(connection)
        assert b"engine_failed" in text
        assert server.child.end(within=60)[0] == 7


@pytest.mark.row("S20")
def test_a_lost_worker_is_replaced_and_the_text_stays_the_same(tmp_path: Path, two_stages: Path) -> None:
    body = {"prompt": "def f(x):", "max_tokens": 200, "temperature": 0.7, "seed": 4, "ignore_eos": True}
    with serving(two_stages, tmp_path / "out", "--processes", "--ctx-size", 1024, "--restart") as server:
        text = json.loads(server.ask(COMPLETIONS, body)[2])["choices"][0]["text"]
        before = server.metric("generation_tokens_total")
        with ThreadPoolExecutor() as threads:
            again = threads.submit(server.ask, COMPLETIONS, body)
            server.wait_until(lambda: server.metric("generation_tokens_total") > before)
            worker_of(server).kill()
            assert json.loads(again.result()[2])["choices"][0]["text"] == text


@pytest.mark.row("S21")
def test_a_worker_that_stands_still_is_named(tmp_path: Path, two_stages: Path) -> None:
    with (
        serving(two_stages, tmp_path / "out", "--processes", "--ctx-size", 1024, "--heartbeat-timeout", 2) as server,
        server.send(COMPLETIONS, {"prompt": "x", "stream": True, **LONG}) as connection,
    ):
        assert connection.recv(10)
        worker_of(server).suspend()
        text = read_all(connection)
        assert b"engine_failed" in text
        assert server.child.end(within=60)[0] == 7
