"""Which link is silent? Control connections may live while the data between two processes goes nowhere.

A link is silent if its sender has begun a message, its receiver waits for it, and not a byte has arrived for too long.
An idle chain has begun nothing, a busy receiver does not wait, and on a slow link bytes arrive: none of them is silent.
Before that, a link is silent if it is not connected in time.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from plans.errors import PeerError
from runtime.distributed.control.messages import LinkCounts

MAX_AGE_BEATS = 2.5
"""Heartbeats within which both ends must have been heard of: else it is not the link, or not the link alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take, in seconds."""

    join_seconds: float = 60.0
    heartbeat_seconds: float = 30.0

    @property
    def beat_seconds(self) -> float:
        """Time between two heartbeats."""
        return min(1.0, self.heartbeat_seconds / 4)


class LinkWatch:
    """Compares what the two ends of every link say, one epoch at a time. Links are called by the rank that sends.

    Args:
        num_ranks: processes of the chain, the last of which sends to the first.
        patience: how long connecting may take, and how long a link may be silent.
        who: what a rank is called.
    """

    def __init__(self, num_ranks: int, *, patience: Patience, who: Callable[[int], str]) -> None:
        self._num_ranks, self._patience, self._who = num_ranks, patience, who
        self._lock = threading.Lock()
        self._epoch: int | None = None
        self._connecting_since: float | None = None
        self._linked: set[tuple[int, int]] = set()
        self._counts: dict[int, LinkCounts] = {}
        self._heard_at: dict[int, float] = {}
        self._silent_since: dict[int, float] = {}

    def start(self, epoch: int | None, *, now: float) -> None:
        """Watch the links of another epoch, which begin to connect; None watches nothing."""
        with self._lock:
            self._epoch, self._connecting_since = epoch, None if epoch is None else now
            self._linked.clear()
        self.forgive()

    def forgive(self) -> None:
        """Count silence anew, after this process stood still itself."""
        with self._lock:
            self._counts.clear()
            self._silent_since.clear()

    def linked(self, rank: int, link: int, *, epoch: int) -> None:
        """Note that one end of a link is connected."""
        with self._lock:
            if epoch == self._epoch:
                self._linked.add((rank, link))

    def connected(self) -> None:
        """Note that everybody is connected."""
        with self._lock:
            self._connecting_since = None

    def hear(self, rank: int, counts: LinkCounts, *, now: float) -> None:
        """Take in what a process says about its links; `now` in seconds of one clock."""
        with self._lock:
            if counts.epoch != self._epoch:
                return
            before = self._counts.get(rank)
            if before is None or _arrived(before) != _arrived(counts):
                self._silent_since.pop(rank, None)
            self._counts[rank], self._heard_at[rank] = counts, now
            for receiver in (rank, self._next(rank)):
                if self._is_owed(receiver):
                    self._silent_since.setdefault(receiver, now)
                else:
                    self._silent_since.pop(receiver, None)

    def fault(self, *, now: float) -> PeerError | None:
        """Return the error of a link that did not connect, or has been silent for too long, naming both ends."""
        with self._lock:
            since = self._connecting_since
            if since is not None:
                return self._missing() if now - since > self._patience.join_seconds else None
            for receiver, since in self._silent_since.items():
                sender = (receiver - 1) % self._num_ranks
                heard_at = min(self._heard_at[sender], self._heard_at[receiver])
                # The silence began up to one heartbeat before it was told.
                is_long = now - since > self._patience.heartbeat_seconds - self._patience.beat_seconds
                if is_long and now - heard_at < MAX_AGE_BEATS * self._patience.beat_seconds:
                    return self._silent(sender, receiver)
        return None

    def _next(self, rank: int) -> int:
        return (rank + 1) % self._num_ranks

    def _is_owed(self, receiver: int) -> bool:
        here, there = self._counts.get(receiver), self._counts.get((receiver - 1) % self._num_ranks)
        return here is not None and there is not None and here.is_waiting and there.sent > here.received

    def _missing(self) -> PeerError | None:
        for link in range(self._num_ranks):
            if not {(link, link), (self._next(link), link)} <= self._linked:
                return PeerError(
                    f"no data connection between {self._who(link)} and {self._who(self._next(link))} "
                    f"within {self._patience.join_seconds:.0f} s",
                    hint="their control connections live: a firewall must let the hosts reach each other at every port",
                    code="E-LINK",
                )
        return None  # connected just now

    def _silent(self, sender: int, receiver: int) -> PeerError:
        sent, arrived = self._counts[sender].sent, self._counts[receiver].received
        return PeerError(
            f"data from {self._who(sender)} does not reach {self._who(receiver)}: {sent} messages were sent, {arrived} "
            f"arrived, and no byte for {self._patience.heartbeat_seconds:.0f} s",
            hint="their control connections live: look at the cable, the firewall, and the MTU "
            "(ping -M do -s 1472 HOST); --heartbeat-timeout sets how long to wait",
            code="E-LINK",
        )


def _arrived(counts: LinkCounts) -> tuple[int, int]:
    return counts.received, counts.received_bytes
