"""Take connections of workers, and keep everybody else from doing harm.

Whoever connects has a few seconds to prove the key, may say a few bytes until then, and shares a bounded number of
places with others who have not proved anything yet. Where all are taken, the newest takes that of the one who waits
longest: a worker proves its key at once, a stranger who says nothing never keeps it out.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from plans.errors import PeerError
from runtime.distributed.control.address import is_same_user, remove_socket
from runtime.distributed.control.channel import Channel
from runtime.distributed.control.keys import HANDSHAKE_SECONDS, welcome

MAX_STRANGERS = 32


class Acceptor:
    """Listens until it is closed.

    Args:
        listener: a listening socket.
        key: what TCP connections must prove; connections over a socket file must come from the same user.
        admit: gets the channel of every process that may talk; runs in a thread of its own.
        warn: told once per address that was sent away.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        key: bytes,
        admit: Callable[[Channel], None],
        warn: Callable[[str], None],
    ) -> None:
        self._listener, self._key = listener, key
        self._admit, self._warn = admit, warn
        self._warned: set[str] = set()
        self._strangers: dict[socket.socket, None] = {}  # in the order in which they came
        self._lock = threading.Lock()
        threading.Thread(target=self._accept_all, daemon=True, name="accept").start()

    def close(self) -> None:
        """Stop listening; a socket file goes away."""
        name = self._listener.getsockname()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if isinstance(name, str) and name:
            with contextlib.suppress(OSError):  # somebody else's by now
                remove_socket(Path(name))

    def _accept_all(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            self._make_place(connection)
            name = str(address[0]) if address else "a socket file"
            threading.Thread(target=self._greet, args=(connection, name), daemon=True).start()

    def _make_place(self, connection: socket.socket) -> None:
        with self._lock:
            if len(self._strangers) >= MAX_STRANGERS:
                longest = next(iter(self._strangers))
                del self._strangers[longest]
                _hang_up(longest)
            self._strangers[connection] = None

    def _greet(self, connection: socket.socket, name: str) -> None:
        # A stranger who sends a byte now and then must leave in time, too.
        timer = threading.Timer(HANDSHAKE_SECONDS, _hang_up, [connection])
        timer.daemon = True
        timer.start()
        try:
            self._check(connection)
        except (OSError, PeerError) as error:
            connection.close()
            self._warn_once(name, error)
            return
        finally:
            timer.cancel()
            with self._lock:
                self._strangers.pop(connection, None)
        connection.settimeout(HANDSHAKE_SECONDS)
        self._admit(Channel(connection, name=name))

    def _check(self, connection: socket.socket) -> None:
        if connection.family == socket.AF_UNIX:
            if not is_same_user(connection):
                raise PeerError("a process of another user wanted to join", code="E-KEY")
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        welcome(connection, self._key)

    def _warn_once(self, name: str, error: Exception) -> None:
        if name not in self._warned and len(self._warned) < MAX_STRANGERS:
            self._warned.add(name)
            reason = error.what if isinstance(error, PeerError) else str(error)
            self._warn(f"sent away a connection from {name}: {reason}")


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
