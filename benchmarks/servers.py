"""The servers that are asked, one at a time: `llamarun serve`, llama.cpp's llama-server, and vLLM's for CPUs."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LLAMARUN = (sys.executable, "-m", "runtime.cli")
READY_SECONDS = 600.0
END_SECONDS = 120.0
LAST_LETTERS = 2000
"""How much is shown of what a server said that did not start."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that can be started.

    Attributes:
        name: what a table calls it.
        command: starts it; the port is appended.
        environment: what it needs beside ours.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def llamarun(target: Path, *options: object) -> Peer:
    """Return ours, serving an export, a plan or a checkpoint; `options` are those of `llamarun serve`."""
    return Peer("llamarun", [*LLAMARUN, "serve", str(target), "--no-verify", *map(str, options), "--port"])


def llama_server(file: Path, *, slots: int, context_tokens: int, program: Path) -> Peer:
    """Return llama.cpp's, serving a GGUF file with so many tokens in every slot."""
    options = ["--ctx-size", str(slots * context_tokens), "--parallel", str(slots), "--threads", str(_num_threads())]
    command = [str(program), "--model", str(file), "--alias", "model", *options, "--no-webui", "--port"]
    return Peer("llama-server", command, {"LD_LIBRARY_PATH": str(program.parent)})


def vllm(folder: Path, *, slots: int, context_tokens: int, program: Path) -> Peer:
    """Return vLLM's for CPUs, serving a checkpoint or an export."""
    options = ["--served-model-name", "model", "--max-num-seqs", str(slots), "--max-model-len", str(context_tokens)]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_num_threads() - 1}",
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return Peer("vLLM", [str(program), "serve", str(folder), "--dtype", "bfloat16", *options, "--port"], environment)


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        port: of this machine, where it listens.
        process: the one that was started; the others are below it.
    """

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> str:
        """What clients call the model."""
        name: Any = json.loads(self._get("/v1/models"))["data"][0]["id"]
        return str(name)

    def resident_bytes(self) -> tuple[int, int]:
        """Resident memory of the process that was started, and of all below it; shared pages count for each."""
        below = self.process.children(recursive=True)
        return self.process.memory_info().rss, sum(one.memory_info().rss for one in below)

    def metrics(self) -> dict[str, float]:
        """What /metrics of ours says, without the buckets of its histograms."""
        text = self._get("/metrics")
        return {name: float(value) for name, value in re.findall(r"^llamarun_(\S+) (\S+)$", text, re.MULTILINE)}

    def is_ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError):
            self._get("/health", seconds=5)
            return True
        return False

    def _get(self, path: str, *, seconds: float = 60) -> str:
        with urllib.request.urlopen(self.url + path, timeout=seconds) as answer:
            return str(answer.read().decode())


@contextlib.contextmanager
def running(peer: Peer, *, log: Path) -> Iterator[Served]:
    """Run a server within the block, which begins once it answers.

    Args:
        peer: which one.
        log: what it says is appended here.

    Raises:
        SystemExit: it ends, or does not answer.
    """
    port = _free_port()
    with (
        log.open("ab") as said,
        subprocess.Popen(
            [*peer.command, str(port)],
            env={**os.environ, **peer.environment},
            stdout=said,
            stderr=said,
            start_new_session=True,
        ) as process,
    ):
        served = Served(port, psutil.Process(process.pid))
        try:
            _wait_until_ready(process, served, log)
            yield served
        finally:
            _end(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], served: Served, log: Path) -> None:
    last = time.monotonic() + READY_SECONDS
    while not served.is_ready():
        code = process.poll()
        if code is not None or time.monotonic() > last:
            why = f"ended with {code}" if code is not None else f"does not answer after {READY_SECONDS:.0f} s"
            raise SystemExit(f"the server {why}:\n{log.read_text(errors='replace')[-LAST_LETTERS:]}")
        time.sleep(0.25)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a server end, and kill whatever is left of it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()
