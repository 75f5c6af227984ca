"""A real server in a process of its own, and what tests ask it with."""

import http.client
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.runtime.distributed.jobs import wait_for
from tests.runtime.distributed.nursery import Child, the_nursery

LLAMARUN = ("llamarun",)
KEY = "a key that is long enough"
LONG = {"max_tokens": 900, "ignore_eos": True, "n": 12}
"""Takes seconds, whatever the machine."""

# What a message says decides what the template does.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.content == 'loop' -%}{%- for i in range(10 ** 5) -%}{%- for j in range(10 ** 5) -%}{%- endfor -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message.content == 'eat' -%}{{ 'x' * 10 ** 10 }}{%- endif -%}"
    "{{ message.role }}: {{ message.content }}\n{%- endfor -%}assistant:"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    child: Child
    port: int

    def client(self, key: str = KEY) -> OpenAI:
        """OpenAI's own client."""
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def ask(
        self, path: str, body: object = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and text; a body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        try:
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def refused(self, path: str, body: object, **headers: str) -> tuple[int, str]:
        """Status and code of an answer that is an error, and short."""
        status, _, text = self.ask(path, body, **headers)
        assert len(text) <= 2048
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return status, error["code"]

    def metric(self, name: str) -> float:
        """A figure of /metrics; 0 where it was never counted."""
        found = re.search(rf"^llamarun_{re.escape(name)} (\S+)$", self.ask("/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def send(self, path: str, body: object) -> socket.socket:
        """Send a request and return its connection, from which nothing was read."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something to become true."""
        wait_for(lambda: True if holds() else None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.metric("requests_running") == 0 == self.metric("requests_waiting")


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@contextmanager
def serving(folder: Path, output: Path, *options: object, program: Sequence[object] = LLAMARUN) -> Iterator[Server]:
    """Start a server on a free port; it is gone afterwards."""
    words = [*program, "serve", folder, "--port", 0, "--no-verify", "--speed", "reference", *options]
    child = the_nursery().start(words, output=output)
    try:
        yield Server(child, port_of(child))
    finally:
        child.process.kill()
        child.process.wait(60)


def port_of(child: Child) -> int:
    """Where it listens, as soon as it says so."""

    def look() -> int | None:
        assert child.process.poll() is None, child.said
        found = re.search(r"at http://\S+:(\d+): ", child.said)
        return int(found[1]) if found else None

    return wait_for(look)


def copy_with_template(shipped: Path, folder: Path) -> Path:
    """The shipped checkpoint with a chat template that does what messages say."""
    shutil.copytree(shipped, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def events_of(text: str) -> list[Any]:
    """The documents of a stream, which must end as it should."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]
