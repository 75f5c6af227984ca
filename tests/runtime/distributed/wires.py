"""Cables made in user space: every packet passes through this process, which may lose, delay or swallow it.

What `tc` and a firewall would do, without needing either of them in the kernel.
"""

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from networks import ip

Rule = Callable[[bytes], bool]
"""Whether a packet is lost."""

CONTROL_PORT = 29501
QUEUE_PACKETS = 12
"""Data beyond that is lost; control packets are not, as where queues are fair."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def is_data(packet: bytes) -> bool:
    """Whether a packet belongs to a TCP connection other than the control connection."""
    if packet[0] >> 4 != 4 or packet[9] != 6:
        return False
    return CONTROL_PORT not in struct.unpack_from("!HH", packet, (packet[0] & 15) * 4)


def is_large(packet: bytes) -> bool:
    """What an MTU black hole swallows."""
    return len(packet) > 400


@dataclass(slots=True)
class Wire:
    """Between two namespaces with the addresses 10.78.N.1 and 10.78.N.2.

    Attributes:
        loses: decides about every packet, once `after_bytes` of data have passed.
        lost_at: when the first packet was lost, on the monotonic clock.
        bytes_per_second: None is as fast as the machine.
        delay_seconds: one way.
    """

    number: int
    loses: Rule = lambda _packet: False
    after_bytes: int = 0
    bytes_per_second: float | None = None
    delay_seconds: float = 0.0
    lost_at: float | None = None
    _data_bytes: int = 0
    _is_over: threading.Event = field(default_factory=threading.Event)

    @property
    def hosts(self) -> tuple[str, str]:
        return f"llamarun-w{self.number}a", f"llamarun-w{self.number}b"

    @property
    def address(self) -> str:
        """Where the first host listens."""
        return f"10.78.{self.number}.1:{CONTROL_PORT}"

    def carry(self, source: int, target: int) -> None:
        """Carry packets in one direction."""
        under_way: deque[tuple[float, bytes]] = deque()
        free_at = 0.0
        while not self._is_over.is_set():
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.2
            if select.select([source], [], [], wait)[0]:
                packet = os.read(source, 65536)
                has_room = len(under_way) < QUEUE_PACKETS or not is_data(packet)
                if has_room and not self._is_lost(packet):
                    rate = self.bytes_per_second
                    free_at = max(free_at, time.monotonic()) + (len(packet) / rate if rate else 0.0)
                    under_way.append((free_at + self.delay_seconds, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                os.write(target, under_way.popleft()[1])

    def _is_lost(self, packet: bytes) -> bool:
        if self._data_bytes >= self.after_bytes and self.loses(packet):
            self.lost_at = self.lost_at or time.monotonic()
            return True
        self._data_bytes += len(packet) if is_data(packet) else 0
        return False


def lossy(share: float) -> Rule:
    chance = random.Random(0)
    return lambda _packet: chance.random() < share


@contextmanager
def wires(count: int) -> Iterator[list[Wire]]:
    """So many pairs of hosts with a wire between them; everything is gone afterwards."""
    made = [Wire(number) for number in range(count)]
    hosts = [host for wire in made for host in wire.hosts]
    ends: list[int] = []
    try:
        for wire in made:
            pair = [_end(host, wire.number, place) for place, host in enumerate(wire.hosts, start=1)]
            ends += pair
            for source, target in (pair, reversed(pair)):
                threading.Thread(target=wire.carry, args=(source, target), daemon=True).start()
        yield made
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"network namespaces or TUN devices are not permitted here: {error}")
    finally:
        for wire in made:
            wire._is_over.set()
        time.sleep(0.3)  # until no thread reads any more
        for end in ends:
            os.close(end)
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=20)


def _end(host: str, number: int, place: int) -> int:
    """Make a host with one end of a wire; returns where its packets are read and written."""
    name = f"wire{number}.{place}"
    ip("netns", "add", host)
    ip("-n", host, "link", "set", "lo", "up")
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    ip("link", "set", name, "netns", host)
    ip("-n", host, "addr", "add", f"10.78.{number}.{place}/24", "dev", name)
    ip("-n", host, "link", "set", name, "up")
    return end
