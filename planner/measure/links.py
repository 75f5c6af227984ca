"""A small probe of what lies between two hosts: latency and bandwidth of one TCP connection, both ways.

One host serves, the other asks. They greet each other as a driver and a worker do, with the same key; after that the
one who asks sends requests of 1 byte what and 8 bytes size. Nothing that a stranger sends is interpreted beyond fields
with limits, and every connection has a deadline.
"""

import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from plans.errors import PeerError, UsageError, printable
from runtime.distributed.control.address import Address, connect, is_loopback, listen, parse_address
from runtime.distributed.control.keys import introduce, read_key, welcome

__all__ = ["LinkSpeed", "is_loopback", "listen", "parse_peer", "probe", "read_key", "serve_one"]

BYE, PING, SEND, RECEIVE = range(4)
REQUEST = struct.Struct("!BQ")
MAX_MESSAGE_BYTES = 32 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_REQUESTS = 300
CONNECT_SECONDS = 3.0
CONNECTION_SECONDS = 30.0
DEFAULT_PORT = 29750
PINGS = 50
REPEATS = 5
BLOCK = bytes(1 << 16)
MAX_NAME_LENGTH = 64


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """One TCP connection, seen from the host that asked."""

    latency_seconds: float
    """Half a round trip of a few bytes."""
    send_bytes_per_second: float
    receive_bytes_per_second: float


def parse_peer(text: str) -> tuple[str, Address]:
    """Read ``[NAME=]HOST[:PORT]``: what the cluster file calls a host, and where it serves.

    Raises:
        UsageError: not of that form.
    """
    name, _, place = text.rpartition("=")
    has_port = ":" in place.rpartition("]")[2]
    try:
        address = parse_address(place if has_port else f"{place}:{DEFAULT_PORT}", where="")
    except UsageError:
        address = None
    is_name = all(c.isalnum() or c in "_.-" for c in name) and name.isascii() and len(name) <= MAX_NAME_LENGTH
    if address is None or address.is_unix or not is_name or any(c.isspace() for c in address.host):
        raise UsageError(
            f"'{printable(text, limit=80)}' is no address", expected="[NAME=]HOST[:PORT] with a port below 65536"
        )
    return name or address.host, address


class _Wire:
    """A connection after its greeting, with one deadline for everything."""

    def __init__(self, connection: socket.socket, *, peer: str) -> None:
        self._socket, self._peer = connection, peer
        self._deadline = time.monotonic() + CONNECTION_SECONDS
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        self._guarded(lambda: self._socket.sendall(data))

    def send_zeros(self, num_bytes: int) -> None:
        for start in range(0, num_bytes, len(BLOCK)):
            self.send(BLOCK[: min(len(BLOCK), num_bytes - start)])

    def receive(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            data += self._receive_some(num_bytes - len(data))
        return bytes(data)

    def skip(self, num_bytes: int) -> None:
        while num_bytes:
            num_bytes -= len(self._receive_some(num_bytes))

    def _receive_some(self, most: int) -> bytes:
        found: list[bytes] = []
        self._guarded(lambda: found.append(self._socket.recv(min(most, 1 << 18))))
        if not found[0]:
            raise PeerError("closed the connection", where=self._peer, code="E-LINKS")
        return found[0]

    def _guarded(self, call: Callable[[], object]) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise PeerError("did not finish in time", where=self._peer, code="E-LINKS")
        self._socket.settimeout(left)
        try:
            call()
        except OSError as error:
            raise _lost(error, self._peer) from None


def _lost(error: OSError, peer: str) -> PeerError:
    what = "did not answer in time" if isinstance(error, TimeoutError) else f"was lost: {error.strerror or error}"
    return PeerError(what, where=peer, hint="is 'llamaplan links --serve' running there?", code="E-LINKS")


def serve_one(server: socket.socket, *, key: bytes) -> bool:
    """Answer one connection; return whether it was a peer with the key that came to an orderly end."""
    connection, place = server.accept()
    with connection:
        try:
            welcome(connection, key)
            return _answer(_Wire(connection, peer=str(place[0])))
        except (PeerError, OSError):
            return False


def probe(address: Address, *, key: bytes) -> LinkSpeed:
    """Measure the connection to a host that serves.

    Raises:
        PeerError: nobody answers there, in time, or with the same key.
    """
    peer = str(address)
    with connect(address, seconds=CONNECT_SECONDS) as connection:
        try:
            introduce(connection, key, name=peer)
        except OSError as error:
            raise _lost(error, peer) from None
        wire = _Wire(connection, peer=peer)
        latency = median(_ping(wire) for _ in range(PINGS)) / 2
        send, receive = _bandwidth(wire, SEND), _bandwidth(wire, RECEIVE)
        wire.send(REQUEST.pack(BYE, 0))
    return LinkSpeed(latency, send, receive)


def _answer(wire: _Wire) -> bool:
    total = 0
    for _ in range(MAX_REQUESTS):
        what, size = REQUEST.unpack(wire.receive(REQUEST.size))
        total += size
        if what == BYE:
            return True
        if what not in (PING, SEND, RECEIVE) or size > MAX_MESSAGE_BYTES or total > MAX_TOTAL_BYTES:
            return False
        if what == SEND:
            wire.skip(size)
        if what == RECEIVE:
            wire.send_zeros(size)
        else:
            wire.send(b"\1")
    return False


def _ping(wire: _Wire) -> float:
    started = time.perf_counter()
    wire.send(REQUEST.pack(PING, 0))
    wire.receive(1)
    return time.perf_counter() - started


def _bandwidth(wire: _Wire, what: int) -> float:
    """Messages grow until one takes long enough to be timed; the median of some of that size counts."""
    size = 1 << 18
    while _transfer(wire, what, size) < 0.05 and size < MAX_MESSAGE_BYTES:
        size *= 4
    size = min(size, MAX_MESSAGE_BYTES)
    return size / median(_transfer(wire, what, size) for _ in range(REPEATS))


def _transfer(wire: _Wire, what: int, size: int) -> float:
    size = min(size, MAX_MESSAGE_BYTES)
    started = time.perf_counter()
    wire.send(REQUEST.pack(what, size))
    if what == SEND:
        wire.send_zeros(size)
        wire.receive(1)
    else:
        wire.skip(size)
    return time.perf_counter() - started
