"""How threads share a native call when the system holds one of them up, in a team of the test's own."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fast import VOCAB_SIZE, make_model
from transformers import DynamicCache

from runtime.fast.native import Library
from runtime.fast.setup import whole
from runtime.fast.speed import Choice

PHASES, FIELDS, TAKEN, DONE = 5, 8, 0, 1
ATTENTION = 2

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_Number = ctypes.CFUNCTYPE(ctypes.c_int)
Run = Callable[[int], None]


class Team:
    """What the kernels take for OpenMP: `run_all` is given what runs the body of a call as a thread of some number."""

    def __init__(self, library: Library, *, size: int, run_all: Callable[[Run], None]) -> None:
        self.library = Library(library.path)
        self._numbers = threading.local()
        self._run_all = run_all
        self._kept = (_Parallel(self._parallel), _Number(lambda: self._numbers.own), _Number(lambda: size))
        self._table = (ctypes.c_void_p * 3)(*(ctypes.cast(function, ctypes.c_void_p).value for function in self._kept))
        self.library.openmp_address = ctypes.addressof(self._table)

    def _parallel(self, body: int, data: int, _threads: int, _flags: int) -> None:
        def run(number: int) -> None:
            self._numbers.own = number
            _Body(body)(data)

        self._run_all(run)


class Model:
    """One model whose steps a team computes, two tokens after an empty cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = make_model("3 heads per key, long rows", dtype=dtype)
        self.stage: Any = None

    def logits(self, library: Library, *, threads: int = 2) -> torch.Tensor:
        fast, cache = whole(self.model, library, Choice(((1000, threads),))), DynamicCache()
        self.stage = fast._parts[0].fast
        ids = torch.arange(3, 3 + 2 * 5).view(5, 2) % VOCAB_SIZE
        logits = fast.step(ids, attention_mask=None, position_ids=None, cache=cache, logits_to_keep=0)
        assert logits is not None
        return logits

    def counter(self, number: int, field: int) -> torch.Tensor:
        """A counter of the call's phase of that number, from 1."""
        return self.stage._scratch[1][number * FIELDS + field]

    @property
    def num_phases(self) -> int:
        return PHASES * len(self.model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_that_another_thread_took_and_never_finished_is_done_again(dtype: torch.dtype, kernels: Library) -> None:
    model, calls = Model(dtype), list[int]()
    expected = model.logits(kernels)

    def run_all(run: Run) -> None:
        is_head = len(calls) % 2
        for number in range(1, 2 if is_head else model.num_phases + 1):
            if is_head or number % PHASES != ATTENTION:  # attention writes to the cache, and is done once
                model.counter(number, TAKEN).fill_(1)
        calls.append(1)
        run(0)

    assert torch.equal(model.logits(Team(kernels, size=1, run_all=run_all).library), expected)
    assert len(calls) == 2


def test_nobody_waits_for_a_thread_that_comes_when_all_is_done(kernels: Library) -> None:
    model, calls = Model(torch.float32), list[int]()
    expected = model.logits(kernels)

    def run_all(run: Run) -> None:
        last = 1 if len(calls) % 2 else model.num_phases
        tasks = -(-VOCAB_SIZE // 32) if len(calls) % 2 else 576 // 32
        calls.append(1)
        first = threading.Thread(target=run, args=(0,))
        first.start()
        while int(model.counter(last, DONE)) < tasks:
            assert first.is_alive()
            time.sleep(0)
        run(1)
        first.join()

    assert torch.equal(model.logits(Team(kernels, size=2, run_all=run_all).library), expected)
    assert len(calls) == 2


def test_many_threads_on_few_processors_change_no_bit(kernels: Library) -> None:
    model = Model(torch.bfloat16)
    expected = model.logits(kernels)

    def run_all(run: Run) -> None:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 8)]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()

    team = Team(kernels, size=8, run_all=run_all)
    for _ in range(5):
        assert torch.equal(model.logits(team.library, threads=8), expected)
