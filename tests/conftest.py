"""What tests of several packages share: the shipped checkpoint, tiny random ones, and a way to run the commands."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Tests run tiny models: one thread is faster than two that wait for each other, and numbers never depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What is known of the machine the tests run on must not change a plan; tests of the probe turn it on, in a folder.
os.environ["LLAMAPLAN_PROBE"] = "0"

# Started in the background, a shell has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure: properties have no time limit, neither to be tested nor to be thought of.
settings.register_profile("llamaplan", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llamaplan")

SHIPPED = Path(__file__).parent / "checkpoint" / "python-llama"


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The trained checkpoint that ships with the repo."""
    return SHIPPED


@pytest.fixture(scope="session")
def packed_shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shipped checkpoint with packed weights: a kind of `packed_checkpoints.KINDS` -> its folder."""
    from packed_checkpoints import KINDS, pack_checkpoint

    def pack(kind: str) -> Path:
        return pack_checkpoint(SHIPPED, tmp_path_factory.mktemp("packed") / kind, scheme_of=KINDS[kind])

    return cache(pack)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


RunCommand = Callable[..., Finished]


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Run `llamaplan` or `llamarun` in this process, as its entry point would."""

    def run(command: str, *arguments: object) -> Finished:
        from planner.cli import run as llamaplan
        from runtime.cli import run as llamarun

        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        capfd.readouterr()
        code = {"llamaplan": llamaplan, "llamarun": llamarun}[command]()
        return Finished(code, *capfd.readouterr())

    return run
