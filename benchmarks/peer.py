"""llama.cpp in a process of another environment: conversion to GGUF, and decoding steps on request."""

import json
import subprocess
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("peer_worker.py")


def convert(folder: Path, *, python: Path) -> Path:
    """Return the GGUF file of a checkpoint folder in its own dtype, made beside the folder if it is not there."""
    target = folder.with_suffix(folder.suffix + ".gguf")
    if not target.is_file():
        subprocess.run([python, _WORKER, "convert", folder, target], check=True)
    return target


class LlamaCpp:
    """A model in llama.cpp, with as many threads as torch has here."""

    def __init__(self, model: Path, ids: list[list[int]], *, python: Path) -> None:
        import torch

        command = [python, _WORKER, "serve", model, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._ask({"ids": ids})

    def prefill(self) -> None:
        """Read the prompt, and choose one token."""
        self._ask({"do": "prefill"})

    def decode(self, count: int) -> list[float]:
        """Make tokens; return the seconds of each."""
        seconds: list[float] = self._ask({"do": "decode", "count": count})
        return seconds

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
