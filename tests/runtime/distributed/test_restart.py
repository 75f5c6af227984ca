"""With --restart, a lost worker costs time and nothing else."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import generate, started, wait_for

Exports = Callable[[int], Path]
NUM_TOKENS = 150
SAMPLED = ["--temp", 0.9, "--top-k", 40, "--repetition-penalty", 1.1, "--seed", 5, "-c", 512]


@pytest.fixture(scope="module")
def text(one_process_text: Callable[..., bytes]) -> bytes:
    """What a run without a loss writes."""
    return one_process_text(*SAMPLED, tokens=NUM_TOKENS)


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_the_final_text_is_the_same_as_without_the_loss(
    exports: Exports, text: bytes, rank: int, number: signal.Signals
) -> None:
    options = [*SAMPLED, "--restart", "--prefill-chunk", 3, "--heartbeat-timeout", 5]
    with started(*generate(exports(3), *options, tokens=NUM_TOKENS), is_held=True) as job:
        victim = job.rank(rank)
        first = job.first_text()
        assert first
        os.kill(victim, number)
        first += job.let_go()
        wait_for(lambda: job.workers().get(rank) not in {None, victim})
        code, rest, said = job.end(within=120)
    assert code == 0, said
    assert "starting it again" in said
    assert first + rest == text
