"""A real `llamarun serve` in a process of its own, for benchmarks that ask it."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        url: without a path.
        process: the one that was started; the others are below it.
    """

    url: str
    process: psutil.Process

    def resident_bytes(self) -> tuple[int, int]:
        """Resident memory of the process that was started, and of all below it; shared pages count for each."""
        below = self.process.children(recursive=True)
        return self.process.memory_info().rss, sum(one.memory_info().rss for one in below)

    def metrics(self) -> dict[str, float]:
        """What /metrics says, without the buckets of its histograms."""
        text = self._get("/metrics")
        return {name: float(value) for name, value in re.findall(r"^llamarun_(\S+) (\S+)$", text, re.MULTILINE)}

    @property
    def model(self) -> str:
        """What clients call the model."""
        name: Any = json.loads(self._get("/v1/models"))["data"][0]["id"]
        return str(name)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())


@contextmanager
def serving(target: Path, log: Path, *options: object) -> Iterator[Served]:
    """Start a server on a free port, and end it by a signal; what it says is in `log`."""
    words = [sys.executable, "-m", "runtime.cli", "serve", target, "--port", 0, "--no-verify", *options]
    with log.open("w") as said, subprocess.Popen([*map(str, words)], stdout=said, stderr=said) as process:
        try:
            yield Served(_url(process, log), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Return where it listens, as soon as it says so."""
    for _ in range(10 * START_SECONDS):
        found = re.search(r"at (http://\S+): ", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise TimeoutError(f"no address after {START_SECONDS} s")
