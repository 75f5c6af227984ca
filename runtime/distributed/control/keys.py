"""The key of the control connection, and the challenge by which both ends prove that they have it.

Every proof covers fresh random challenges of both ends and the role of its sender, so that nothing recorded or sent
back works. It protects who may join, not what is sent: that is what a trusted network is for.
"""

import hashlib
import hmac
import json
import os
import secrets
import socket
import stat
import time
from pathlib import Path

from plans.errors import InputError, MachineError, PeerError
from plans.reading.files import explain_os_error, open_regular, read_exactly
from plans.reading.strict import parse_json
from runtime.distributed.control.channel import receive_frame, send_frame
from runtime.distributed.control.messages import PROTOCOL

MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 4096
MAX_GREETING_BYTES = 1024
HANDSHAKE_SECONDS = 5.0
_GREETING = "llamarun"


def read_key(path: Path) -> bytes:
    """Read a key file.

    Raises:
        InputError: missing.
        MachineError: others can read it, or it is too short.
    """
    with open_regular(path) as fd:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise MachineError(
                f"others can read the key (mode {mode:04o})", where=path, expected="0600", hint=f"chmod 600 {path}",
                code="E-KEY",
            )  # fmt: skip
        if status.st_size > MAX_KEY_BYTES:
            raise MachineError(
                f"has {status.st_size} bytes", where=path, expected=f"at most {MAX_KEY_BYTES}", code="E-KEY"
            )
        try:
            key = read_exactly(fd, size=status.st_size, offset=0, where=path).strip()
        except OSError as error:
            raise explain_os_error(error, path) from None
    if len(key) < MIN_KEY_BYTES:
        raise MachineError(
            f"holds a key of {len(key)} bytes",
            where=path,
            expected=f"at least {MIN_KEY_BYTES}",
            hint="make one with: (umask 077; head -c 32 /dev/urandom | base64 > KEYFILE)",
            code="E-KEY",
        )
    return key


def welcome(connection: socket.socket, key: bytes) -> None:
    """Check as the driver that a new connection has the key, and prove the same.

    Raises:
        PeerError: it has not, or speaks something else.
        OSError: it left or was too slow.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    ours = secrets.token_hex(32)
    _say(connection, {"greeting": _GREETING, "protocol": PROTOCOL, "challenge": ours})
    answer = _hear(connection, {"challenge", "proof"}, deadline=deadline)
    theirs = answer["challenge"]
    if not _is_same(_proof(key, "worker", ours, theirs), answer["proof"]):
        _say(connection, {"proof": ""})
        raise PeerError("a process with another key wanted to join", code="E-KEY")
    _say(connection, {"proof": _proof(key, "driver", ours, theirs)})


def introduce(connection: socket.socket, key: bytes, *, name: str) -> None:
    """Prove as a worker that this process has the key, and check that the driver has it.

    Raises:
        PeerError: the keys differ, or the other end is no driver.
        OSError: it left or was too slow.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    greeting = _hear(connection, {"greeting", "protocol", "challenge"}, deadline=deadline)
    if greeting["greeting"] != _GREETING:
        raise PeerError(f"what listens at {name} is no llamarun", code="E-PROTOCOL")
    theirs, ours = greeting["challenge"], secrets.token_hex(32)
    _say(connection, {"challenge": ours, "proof": _proof(key, "worker", theirs, ours)})
    answer = _hear(connection, {"proof"}, deadline=deadline)
    if not _is_same(_proof(key, "driver", theirs, ours), answer["proof"]):
        raise PeerError(
            f"the key is not that of the driver at {name}", hint="use the same --key-file everywhere", code="E-KEY"
        )


def _proof(key: bytes, role: str, driver_challenge: str, worker_challenge: str) -> str:
    text = f"{_GREETING} {PROTOCOL} {role} {driver_challenge} {worker_challenge}"
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _is_same(expected: str, given: str) -> bool:
    return hmac.compare_digest(expected.encode(), given.encode())


def _say(connection: socket.socket, document: dict[str, object]) -> None:
    send_frame(connection, json.dumps(document).encode())


def _hear(connection: socket.socket, names: set[str], *, deadline: float) -> dict[str, str]:
    connection.settimeout(max(0.01, deadline - time.monotonic()))
    data = receive_frame(connection, max_bytes=MAX_GREETING_BYTES)
    if data is None:
        raise ConnectionAbortedError("it closed during the greeting")
    try:
        document = parse_json(data, where="greeting")
    except InputError:
        document = None
    if not isinstance(document, dict) or set(document) != names:
        raise PeerError("the other end does not speak llamarun", code="E-PROTOCOL")
    return {name: str(value) for name, value in document.items()}
