"""What the chain costs: 1, 2 and 4 stages in one process against the unsplit model's `generate()`.

Every variant generates in a thread of its own and they take turns token by token, in random order: whatever else the
machine does falls on all of them alike. One CPU thread each, since turns would make a second one spin.

Run: python -m benchmarks chain
"""

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import SHAPES, make_checkpoint

PROMPT_TOKENS = 64
NEW_TOKENS = 160


def main() -> None:
    """Print milliseconds per token and the ratio to the unsplit model."""
    import torch

    torch.set_num_threads(1)
    print(f"chain against unsplit generate(): prompt {PROMPT_TOKENS}, {NEW_TOKENS} greedy tokens, turns token by token")
    with tempfile.TemporaryDirectory() as temp:
        for dtype in ("float32", "bfloat16"):
            folder = make_checkpoint(SHAPES["100M"], Path(temp), dtype=dtype)
            results = take_turns(_variants(folder, SHAPES["100M"].num_hidden_layers))
            for name, seconds in results.items():
                ratio = seconds / results["unsplit"]
                print(f"  100M {dtype:8}  {name:12} {1000 * seconds:7.2f} ms/token  x{ratio:.3f}")


def _variants(folder: Path, num_layers: int) -> dict[str, Any]:
    from plans.stages import StageRange
    from runtime import load
    from runtime.stages.parity import load_unsplit

    variants: dict[str, Any] = {}
    for num_stages in (1, 2, 4):
        edges = [num_layers * k // num_stages for k in range(num_stages + 1)]
        stages = [
            StageRange("cpu", start, end, has_embedding=start == 0, has_head=end == num_layers)
            for start, end in pairwise(edges)
        ]
        variants[f"{num_stages} stages"] = load(folder, stages=stages)
    dtype = variants["1 stages"].dtype
    # The unsplit model twice: how far its second copy is from 1.0 says what a ratio means on this machine.
    return {"unsplit": load_unsplit(folder, dtype=dtype), "unsplit again": load_unsplit(folder, dtype=dtype)} | variants


class _Turn:
    """A streamer that hands over after every token."""

    def __init__(self) -> None:
        self.may_go, self.is_done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self._started = 0.0

    def put(self, _tokens: object) -> None:
        self.seconds.append(time.thread_time() - self._started)
        self.is_done.release()
        self.may_go.acquire()
        self._started = time.thread_time()

    def end(self) -> None:
        self.is_done.release()


def take_turns(models: Mapping[str, Any]) -> dict[str, float]:
    """Return the median processor seconds per token of every model's `generate()`."""
    import torch

    ids = torch.arange(PROMPT_TOKENS)[None] % 1000
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    turns = {name: _Turn() for name in models}
    threads = [
        threading.Thread(target=lambda m=model, t=turns[name]: m.generate(ids, streamer=t, **settings))
        for name, model in models.items()
    ]
    for thread, turn in zip(threads, turns.values(), strict=True):
        thread.start()  # up to the prompt, which is streamed first
        turn.is_done.acquire()
    order = list(turns.values())
    for _ in range(NEW_TOKENS):
        random.shuffle(order)
        for turn in order:
            turn.may_go.release()
            turn.is_done.acquire()
    for thread, turn in zip(threads, turns.values(), strict=True):
        turn.may_go.release()
        thread.join()
    # The first two turns hold the start and the prefill.
    return {name: statistics.median(turn.seconds[2:]) for name, turn in turns.items()}
