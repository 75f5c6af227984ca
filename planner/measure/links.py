"""A small probe of what lies between two hosts: latency and bandwidth of one TCP connection, both ways.

One host serves, the other asks. Both prove that they hold the same key (HMAC over both sides' nonces); nothing that a
stranger sends is interpreted beyond fixed-size fields with limits, and every connection has a deadline.

    server  MAGIC nonce                      client  MAGIC nonce HMAC(key, "client" nonces)
    server  HMAC(key, "server" nonces)       client  requests: 1 byte what, 8 bytes size
"""

import hmac
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from plans.errors import MachineError, PeerError

MAGIC = b"llmlink1"
NONCE_BYTES = DIGEST_BYTES = 32
BYE, PING, SEND, RECEIVE = range(4)
REQUEST = struct.Struct("!BQ")
MAX_MESSAGE_BYTES = 32 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_REQUESTS = 300
HANDSHAKE_SECONDS = 3.0
CONNECTION_SECONDS = 30.0
DEFAULT_PORT = 29750
PINGS = 50
REPEATS = 5
BLOCK = bytes(1 << 16)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """One TCP connection, seen from the host that asked."""

    latency_seconds: float
    """Half a round trip of a few bytes."""
    send_bytes_per_second: float
    receive_bytes_per_second: float


class _Wire:
    """A socket with one deadline for everything; every short read or timeout is a lost peer."""

    def __init__(self, connection: socket.socket, *, peer: str, seconds: float) -> None:
        self._socket, self._peer = connection, peer
        self.deadline = time.monotonic() + seconds
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
            raise self._lost("closed the connection")
        return found[0]

    def _guarded(self, call: Callable[[], object]) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._lost("did not finish in time")
        self._socket.settimeout(left)
        try:
            call()
        except TimeoutError:
            raise self._lost("did not answer in time") from None
        except OSError as error:
            raise self._lost(f"was lost: {error.strerror or error}") from None

    def _lost(self, what: str) -> PeerError:
        return PeerError(what, where=self._peer, hint="is 'llamaplan links --serve' running there?", code="E-LINKS")


def listen(address: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        MachineError: the address is not of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, number, _name, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, number)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(place)
        server.listen(4)
    except (OSError, OverflowError) as error:
        raise MachineError(
            f"cannot listen: {error}", where=f"{address}:{port}", hint="choose another --listen", code="E-PORT"
        ) from None
    return server


def serve_one(server: socket.socket, *, key: bytes) -> bool:
    """Answer one connection; return whether it was a peer with the key that came to an orderly end."""
    connection, place = server.accept()
    with connection:
        try:
            wire = _Wire(connection, peer=str(place[0]), seconds=HANDSHAKE_SECONDS)
            _admit(wire, key)
            wire.deadline = time.monotonic() + CONNECTION_SECONDS
            return _answer(wire)
        except PeerError:
            return False


def probe(address: str, port: int, *, key: bytes) -> LinkSpeed:
    """Measure the connection to a host that serves.

    Raises:
        PeerError: nobody answers there, in time, or with the same key.
    """
    peer = f"{address}:{port}"
    try:
        connection = socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS)
    except OSError as error:
        raise PeerError(
            f"cannot connect: {error}",
            where=peer,
            hint="start 'llamaplan links --serve' there; is a firewall between?",
            code="E-LINKS",
        ) from None
    with connection:
        wire = _Wire(connection, peer=peer, seconds=HANDSHAKE_SECONDS)
        _introduce(wire, key, peer)
        wire.deadline = time.monotonic() + CONNECTION_SECONDS
        latency = median(_ping(wire) for _ in range(PINGS)) / 2
        send, receive = _bandwidth(wire, SEND), _bandwidth(wire, RECEIVE)
        wire.send(REQUEST.pack(BYE, 0))
    return LinkSpeed(latency, send, receive)


def _admit(wire: _Wire, key: bytes) -> None:
    ours = os.urandom(NONCE_BYTES)
    wire.send(MAGIC + ours)
    hello = wire.receive(len(MAGIC) + NONCE_BYTES + DIGEST_BYTES)
    theirs, proof = hello[len(MAGIC) : len(MAGIC) + NONCE_BYTES], hello[-DIGEST_BYTES:]
    if not (hello.startswith(MAGIC) and hmac.compare_digest(proof, _proof(key, b"client", ours + theirs))):
        raise PeerError("does not hold the key", code="E-LINKS")
    wire.send(_proof(key, b"server", ours + theirs))


def _introduce(wire: _Wire, key: bytes, peer: str) -> None:
    hello = wire.receive(len(MAGIC) + NONCE_BYTES)
    if not hello.startswith(MAGIC):
        raise PeerError("is something else", where=peer, expected="llamaplan links --serve", code="E-LINKS")
    theirs, ours = hello[len(MAGIC) :], os.urandom(NONCE_BYTES)
    wire.send(MAGIC + ours + _proof(key, b"client", theirs + ours))
    try:
        proof = wire.receive(DIGEST_BYTES)
    except PeerError:
        proof = b""
    if not hmac.compare_digest(proof, _proof(key, b"server", theirs + ours)):
        raise PeerError(
            "refused us, or holds another key", where=peer, hint="give both the same --key-file", code="E-KEY"
        )


def _proof(key: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, role + nonces, "sha256")


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
