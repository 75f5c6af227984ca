"""The servers that are compared, one at a time: `llamarun serve`, llama.cpp's llama-server, and vLLM's for CPUs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT_TOKENS = 512
READY_SECONDS = 600.0
END_SECONDS = 30.0
LLAMARUN = "import sys; from runtime.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server.

    Attributes:
        name: what the table calls it.
        command: starts it; the port is appended.
        environment: what it needs beside ours.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def llamarun(folder: Path, *, slots: int) -> Peer:
    """Return ours, serving a checkpoint or an export."""
    options = ["--name", "model", "--slots", str(slots), "--ctx-size", str(CONTEXT_TOKENS), "--no-verify", "--quiet"]
    return Peer("llamarun", [sys.executable, "-c", LLAMARUN, "serve", str(folder), *options, "--port"])


def llama_server(file: Path, *, slots: int, program: Path) -> Peer:
    """Return llama.cpp's, serving a GGUF file with as many tokens in every slot."""
    options = ["--ctx-size", str(slots * CONTEXT_TOKENS), "--parallel", str(slots), "--threads", str(_num_threads())]
    command = [str(program), "--model", str(file), "--alias", "model", *options, "--no-webui", "--port"]
    return Peer("llama-server", command, {"LD_LIBRARY_PATH": str(program.parent)})


def vllm(folder: Path, *, slots: int, program: Path) -> Peer:
    """Return vLLM's for CPUs, serving a checkpoint or an export."""
    options = ["--served-model-name", "model", "--max-num-seqs", str(slots), "--max-model-len", str(CONTEXT_TOKENS)]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_num_threads() - 1}",
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return Peer("vLLM", [str(program), "serve", str(folder), "--dtype", "bfloat16", *options, "--port"], environment)


@contextlib.contextmanager
def running(peer: Peer, *, log: Path) -> Iterator[int]:
    """Run a server within the block; the port, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
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
        try:
            _wait_until_ready(process, port, log)
            yield port
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    last = time.monotonic() + READY_SECONDS
    while time.monotonic() < last:
        if process.poll() is not None:
            raise SystemExit(f"the server ended; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.25)
    raise SystemExit(f"the server does not answer; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()
