"""Why a run cannot go on: the first reason counts, and whoever waits for anything learns of it."""

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

from plans.errors import LlamaplanError, PeerError


@dataclass(frozen=True, slots=True)
class Fault:
    """Put into the event queue when the run cannot go on."""

    error: LlamaplanError


@dataclass(frozen=True, slots=True)
class Loss:
    """Put into the event queue when a worker is gone that will be started again."""

    rank: int
    error: PeerError


class Faults:
    """What went wrong in a run so far, and what can still be mended.

    Args:
        num_restarts: how many lost workers may be started again.

    Attributes:
        fault: why the run cannot go on.
        loss: the worker that has to be started again before it can go on.
        is_over: the run ends; nothing that happens now is a fault.
        is_handled: the main thread knows.
        events: gets a `Fault` or a `Loss` when the run cannot go on, and whatever else the driver waits for.
        changed: notified when anything that somebody may wait for has changed.
    """

    def __init__(self, *, num_restarts: int) -> None:
        self._num_restarts = num_restarts
        self._fault_at = 0.0
        self._suspicion: tuple[float, str] | None = None
        self.fault: LlamaplanError | None = None
        self.loss: Loss | None = None
        self.is_over = self.is_handled = False
        self.events: queue.Queue[Any] = queue.Queue()
        self.changed = threading.Condition()

    def check(self) -> None:
        """Raise the fault of the run, if there is one."""
        if self.fault is not None:
            self.is_handled = True
            raise self.fault

    def record(self, error: LlamaplanError) -> bool:
        """Record why the run cannot go on; False if that was known already."""
        with self.changed:
            if self.fault is not None or self.is_over:
                return False
            self.fault, self._fault_at = error, time.monotonic()
            self.changed.notify_all()
        return True

    def record_loss(self, rank: int, error: PeerError, *, was_running: bool) -> bool:
        """Record that a worker is gone; False if that is the end of the run, because none may be started again."""
        with self.changed:
            if not was_running or self._num_restarts == 0 or self.loss or self.fault or self.is_over:
                return False
            self._num_restarts -= 1
            self.loss = Loss(rank, error)
        self.events.put(self.loss)
        return True

    def is_lost(self, rank: int) -> bool:
        """Whether this is the worker that has to be started again."""
        return self.loss is not None and self.loss.rank == rank

    def mended(self) -> None:
        """Forget the loss: a new worker takes the place."""
        self.loss = self._suspicion = None

    def suspect(self, text: str) -> None:
        """Note that a data connection broke; if nobody turns out to be gone, that itself is the fault."""
        with self.changed:
            self._suspicion = self._suspicion or (time.monotonic(), text)

    def confirmed_suspicion(self, *, after_seconds: float) -> str | None:
        """Return what broke so long ago that the news of whose fault it was should be here; None if nothing did."""
        found = self._suspicion
        if found is None or self.loss is not None or time.monotonic() - found[0] <= after_seconds:
            return None
        return found[1]

    def is_stuck(self, *, after_seconds: float) -> bool:
        """Whether the main thread has not noticed a fault for so long."""
        return self.fault is not None and not self.is_handled and time.monotonic() - self._fault_at > after_seconds
