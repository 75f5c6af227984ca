"""One end of a control connection: length-prefixed frames, one JSON message each."""

import contextlib
import socket
import struct
import threading
import time

from plans.errors import PeerError
from runtime.distributed.control.messages import Message, decode, encode

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("!I")


class Channel:
    """Sends from any thread; one thread receives.

    Args:
        connection: a connected stream socket; closed with the channel.
        name: what to call the other end in messages.

    Attributes:
        last_heard: `time.monotonic()` of the last bytes that arrived.
    """

    def __init__(self, connection: socket.socket, *, name: str) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self.name = name
        self.last_heard = time.monotonic()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the connection is gone.
        """
        with self._lock:  # a frame must leave whole
            send_frame(self._socket, encode(message))

    def try_send(self, message: Message) -> None:
        """Send a message, or nothing if the connection is gone: whoever receives from it will notice."""
        with contextlib.suppress(OSError):
            self.send(message)

    def receive(self) -> Message | None:
        """Return the next message, or None when the other end has closed.

        Raises:
            PeerError: something that is no message.
        """
        try:
            data = receive_frame(self._socket, max_bytes=MAX_FRAME_BYTES)
        except OSError:
            return None
        self.last_heard = time.monotonic()
        return None if data is None else decode(data)

    def set_timeout(self, seconds: float | None) -> None:
        """Bound how long sending and receiving may take; None for no bound."""
        self._socket.settimeout(seconds)

    def local_address(self) -> str:
        """Return the address of this end; empty for a socket without one."""
        if self._socket.family not in {socket.AF_INET, socket.AF_INET6}:
            return ""
        return str(self._socket.getsockname()[0])

    def close(self) -> None:
        """Close the connection; a thread that receives from it wakes up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Send one frame."""
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_frame(connection: socket.socket, *, max_bytes: int) -> bytes | None:
    """Return the next frame, or None at the end of the stream.

    Raises:
        PeerError: a frame longer than `max_bytes`; nothing of it is read.
        OSError: the connection is gone, or a timeout set on it has passed.
    """
    head = _receive_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise PeerError(f"a frame of {length} bytes was announced", expected=f"at most {max_bytes}")
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
