"""Was the machine ours alone while something was timed?"""

import os
import time

import psutil

MOST_OTHER_CORES = 0.1
"""A window counts as calm while other programs take no more than this much of one core."""
WINDOW_SECONDS = 0.5
"""The system counts processor time in steps of 10 ms; shorter windows say nothing."""


class CalmMeter:
    """Compares the processor time of the whole machine with that of this process and its finished
    children, from one reading to the next.

    Example:
        >>> meter = CalmMeter()
        >>> meter.other_cores() >= 0
        True
    """

    def __init__(self) -> None:
        self._last = self._reading()

    @property
    def seconds(self) -> float:
        """Seconds since the last reading."""
        return time.monotonic() - self._last[0]

    def other_cores(self) -> float:
        """Return how many cores other programs (or, on a virtual machine, its neighbours) kept busy; read anew."""
        now = self._reading()
        seconds, machine, ours = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        return max(0.0, (machine - ours) / max(seconds, 1e-9))

    @staticmethod
    def _reading() -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), os.times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts guests' time twice: in `user` and in `guest`.
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system
