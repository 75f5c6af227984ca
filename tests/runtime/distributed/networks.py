"""Hosts for tests: network namespaces of this machine with cables between them. Skipped where they may not be made."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True, slots=True)
class Cable:
    """Between two namespaces; the end in the first has the address 10.77.N.1, the other 10.77.N.2."""

    hosts: tuple[str, str]
    number: int = 0

    @property
    def name(self) -> str:
        """Of the interface at both ends."""
        return f"cable{self.number}"

    @property
    def address(self) -> str:
        """Where the first host listens. Nobody else uses its ports: workers need not wait to be told one."""
        return f"10.77.{self.number}.1:29501"

    def shape(self, rule: str | None) -> None:
        """Make the cable slow, in both directions, by a rule of `tc`; without one, as fast as the machine."""
        for host in self.hosts:
            subprocess.run(
                ["tc", "-n", host, "qdisc", "del", "dev", self.name, "root"], capture_output=True, timeout=20
            )
            words = ["tc", "-n", host, "qdisc", "add", "dev", self.name, "root", *(rule or "").split()]
            if rule and subprocess.run(words, capture_output=True, timeout=20).returncode:
                pytest.skip(f"this kernel has no {words[8]}")

    def cut(self) -> None:
        """Take it down."""
        ip("-n", self.hosts[0], "link", "set", self.name, "down")

    def plug_in(self) -> None:
        """Make it."""
        first, second = self.hosts
        ip("link", "add", self.name, "netns", first, "type", "veth", "peer", "name", self.name, "netns", second)
        for end, host in enumerate(self.hosts, start=1):
            ip("-n", host, "addr", "add", f"10.77.{self.number}.{end}/24", "dev", self.name)
            ip("-n", host, "link", "set", self.name, "up")


@contextmanager
def cables(*pairs: tuple[str, str]) -> Iterator[list[Cable]]:
    """Hosts with a cable between each pair; everything is gone afterwards."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("there is no ip command")
    named = [(f"{a}-{os.getpid()}", f"{b}-{os.getpid()}") for a, b in pairs]  # several may test on one machine
    made = [Cable(pair, number) for number, pair in enumerate(named)]
    hosts = sorted({host for pair in named for host in pair})
    try:
        for host in hosts:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        for cable in made:
            cable.plug_in()
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=20)
