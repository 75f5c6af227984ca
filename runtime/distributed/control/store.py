"""The store through which torch.distributed's processes find each other, over the control connections.

No store listens anywhere: what a process sets is sent to the driver and from there to everybody, and reads wait for
it. Only processes that were let in see it.
"""

import base64
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from plans.errors import PeerError
from runtime.distributed.control.messages import Put


class SharedStore(Store):
    """One process's copy of the store.

    Args:
        publish: sends an entry on its way to the other processes.
        has_ended: asked while waiting; once true, waiting fails.
    """

    def __init__(self, publish: Callable[[Put], None], *, has_ended: Callable[[], bool]) -> None:
        super().__init__()
        self._publish = publish
        self._has_ended = has_ended
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def receive(self, entry: Put) -> None:
        """Take over an entry that another process set."""
        with self._changed:
            self._entries[entry.key] = base64.b64decode(entry.value)
            self._changed.notify_all()

    def set(self, key: str, value: bytes | str) -> None:
        """Set an entry for everybody."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        entry = Put(key=key, value=base64.b64encode(data).decode())
        self.receive(entry)
        self._publish(entry)

    def get(self, key: str) -> bytes:
        """Return an entry, waiting until somebody sets it."""
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: Sequence[str], _timeout: timedelta | None = None) -> None:
        """Wait until all entries are there.

        Raises:
            PeerError: the run ended first.
        """
        with self._changed:
            while not all(key in self._entries for key in keys):
                if self._has_ended():
                    raise PeerError("the run ended while its processes were connecting")
                self._changed.wait(timeout=0.2)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all entries are there."""
        return all(key in self._entries for key in keys)

    def has_extended_api(self) -> bool:
        """Only the plain calls."""
        return False
