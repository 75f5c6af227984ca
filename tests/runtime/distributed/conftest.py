"""Exports of the shipped checkpoint cut into 2, 3 and 4 stages, and sessions whose stages are processes."""

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from jobs import generate
from transformers import PreTrainedConfig

from exporter import export
from runtime.cli import run as llamarun
from runtime.distributed.control.address import parse_address
from runtime.distributed.opening import open_processes
from runtime.distributed.session import ProcessSession, ProcessSettings
from runtime.prepared import Prepared, prepare_session
from runtime.reading.opening import open_source
from runtime.session import Session, load_session
from tests.exporter.export_helpers import make_plan
from tests.runtime.distributed.nursery import Nursery, the_nursery

CUTS = {2: [4, 3], 3: [2, 4, 1], 4: [0, 3, 4, 0]}


@pytest.fixture(scope="session")
def exports(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An export with so many stages, all planned for the CPU."""

    @cache
    def make(num_stages: int) -> Path:
        folder = tmp_path_factory.mktemp("export") / str(num_stages)
        devices = [f"cpu#{number}" for number in range(num_stages)]
        export(make_plan(shipped, CUTS[num_stages], devices=devices), model=shipped, output=folder)
        return folder

    return make


def prepare(folder: Path) -> Prepared:
    return prepare_session(open_source(folder, model=None), device_map={}, context_tokens=256)


@pytest.fixture
def make_whole(
    make_checkpoint: Callable[[PreTrainedConfig], Path], shipped: Path
) -> Callable[[PreTrainedConfig], Path]:
    """Write a random checkpoint that has the shipped tokenizer, since commands want one."""

    def make(config: PreTrainedConfig) -> Path:
        model = make_checkpoint(config)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shipped / name, model)
        return model

    return make


@pytest.fixture(scope="session")
def one_process_text(exports: Callable[[int], Path]) -> Callable[..., bytes]:
    """What the same command writes without --processes, in this process; the options are those of `generate`."""

    def write(*options: object, tokens: int) -> bytes:
        words = [word for word in generate(exports(3), *options, tokens=tokens) if word != "--processes"]
        with pytest.MonkeyPatch.context() as patch, io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out:
            patch.setattr(sys, "argv", ["llamarun", *map(str, words)])
            patch.setattr(sys, "stdout", out)
            assert llamarun() == 0
            return out.buffer.getvalue()

    return write


@pytest.fixture(scope="session")
def greedy_text(one_process_text: Callable[..., bytes]) -> Callable[[int], bytes]:
    """What one process writes for so many tokens."""
    return cache(lambda num_tokens: one_process_text("--temp", 0, "-c", 1024, tokens=num_tokens))


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Starts processes that have imported everything already."""
    return the_nursery()


@pytest.fixture(scope="session")
def in_one_process(exports: Callable[[int], Path]) -> Callable[[int], Session]:
    """The same stages as one chain in this process."""
    return cache(lambda num_stages: load_session(prepare(exports(num_stages))))


@pytest.fixture(scope="session")
def join_processes(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ProcessSession]:
    """Open a session whose workers join it; whoever calls closes it."""

    def join(folder: Path, prepared: Prepared) -> ProcessSession:
        place = tmp_path_factory.mktemp("joined")
        address = f"unix:{place / 'socket'}"
        for rank in range(1, len(prepared.source.stages)):
            words = ["runtime.worker", folder, "--rank", rank, "--join", address]
            nursery.start(words, output=place / f"worker{rank}")
        return open_processes(prepared, ProcessSettings(listen=parse_address(address, where="--listen"), threads=1))

    return join


@pytest.fixture(scope="session")
def in_processes(
    exports: Callable[[int], Path], join_processes: Callable[..., ProcessSession]
) -> Iterator[Callable[[int], ProcessSession]]:
    """A running session with so many processes; all end with the tests."""
    with ExitStack() as stack:

        @cache
        def start(num_stages: int) -> ProcessSession:
            folder = exports(num_stages)
            return stack.enter_context(join_processes(folder, prepare(folder)))

        yield start
