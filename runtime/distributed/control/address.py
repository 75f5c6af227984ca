"""Where the driver listens for workers, and where workers find it."""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from plans.errors import MachineError, PeerError, UsageError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", re.ASCII)
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Address:
    """`ADDR:PORT`, or `unix:PATH` for processes of one user on one machine.

    >>> str(parse_address("[::1]:0", where="--listen"))
    '[::1]:0'
    """

    host: str
    port: int
    path: str = ""

    @property
    def is_unix(self) -> bool:
        """Whether it is a socket file."""
        return bool(self.path)

    def __str__(self) -> str:
        if self.is_unix:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, where: str) -> Address:
    """Read an address.

    Raises:
        UsageError: not of that form.
    """
    if text.startswith(_UNIX) and len(text) > len(_UNIX):
        return Address("", 0, text.removeprefix(_UNIX))
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise UsageError(
            f"'{text}' is no address", where=where, expected="ADDR:PORT such as 192.168.1.10:29501", code="E-ADDRESS"
        )
    return Address(match["v6"] or match["host"], int(match["port"]))


def listen(address: Address) -> tuple[socket.socket, Address]:
    """Listen, and only there; returns the socket and the address with the port that was chosen.

    Raises:
        MachineError: the port is taken or not allowed, or the address is not of this machine.
    """
    try:
        listener = _unix_listener(address) if address.is_unix else _tcp_listener(address)
    except OSError as error:
        raise MachineError(
            f"cannot listen: {error.strerror or error} (errno {error.errno})",
            where=str(address),
            hint="take another name, or remove what is there"
            if address.is_unix
            else "another run may have the port ('ss -ltnp' shows whose it is); port 0 takes a free one; the address "
            "must be one of this machine",
            code="E-LISTEN",
        ) from None
    if address.is_unix:
        return listener, address
    return listener, Address(address.host, listener.getsockname()[1])


def connect(address: Address, *, seconds: float) -> socket.socket:
    """Connect to a driver that may not be up yet.

    Raises:
        PeerError: nobody answered in time.
    """
    import time

    deadline = time.monotonic() + seconds
    while True:
        try:
            return _connect_once(address, timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise PeerError(
                    f"nobody answered within {seconds:.0f} s ({error.strerror or error})",
                    where=str(address),
                    hint="start the driver (rank 0) there first, and check the address and the firewall",
                    code="E-JOIN",
                ) from None
            time.sleep(0.2)


def remove_socket(path: Path) -> None:
    """Remove a socket file of this user at which nobody listens any more; nothing else.

    Raises:
        OSError: there is something else, or somebody listens.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, "something that is no socket of this user has this name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(BlockingIOError):
        probe.settimeout(0)  # whoever listens may not be accepting
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "somebody listens there")


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is run by this user."""
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.geteuid())


def is_loopback(host: str) -> bool:
    """Whether an address leads nowhere but to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tcp_listener(address: Address) -> socket.socket:
    family, _kind, _protocol, _name, place = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def _unix_listener(address: Address) -> socket.socket:
    remove_socket(Path(address.path))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address.path)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def _connect_once(address: Address, *, timeout: float) -> socket.socket:
    if not address.is_unix:
        return socket.create_connection((address.host, address.port), timeout=timeout)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address.path)
    except OSError:
        connection.close()
        raise
    return connection
