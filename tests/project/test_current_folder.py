"""Nothing in the current folder is imported or run, whatever it is called."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from exporter.emit import emit
from plans.check import read_plan
from tests.conftest import SHIPPED
from tests.runtime.distributed.nursery import Nursery

COMMANDS = Path(sys.executable).parent
PROMPT = ["--prompt-ids", "1,2,3", "-n", "2"]
SOLVE = ["llamaplan", "solve", SHIPPED, "-c", "64", "--prompt-tokens", "8", "--new-tokens", "8"]
RUNS: dict[str, list[object]] = {
    "analyze": ["llamaplan", "analyze", SHIPPED],
    "devices": ["llamaplan", "devices", "--device", "cpu"],
    "solve": [*SOLVE, "--device", "cpu=1GiB"],
    "solve with CBC": [*SOLVE, "--device", "cpu=1GiB", "--solver", "cbc"],
    "compare": ["llamaplan", "compare", SHIPPED, "--device", "cpu=1GiB", "-c", "64"],
    "frontier": ["llamaplan", "frontier", SHIPPED, "--device", "cpu=1GiB", "-c", "64"],
    "report": ["llamaplan", "report", "plan.json", "-o", "report.html"],
    "simulate": ["llamaplan", "simulate", "plan.json", "--requests", "3", "--rate", "2"],
    "measure": ["llamaplan", "devices", "small.json", "--measure"],
    "emit": ["llamaplan", "emit", "plan.json", "--for", "transformers"],
    "verify": ["llamaplan", "verify", "shards", "--model", SHIPPED],
    "generate": ["llamarun", "generate", "shards", *PROMPT],
    "generate with processes": ["llamarun", "generate", "shards", "--processes", *PROMPT],
    "batch": ["llamarun", "batch", "shards", "prompts.jsonl", "-o", "answers.jsonl", "-n", "2"],
    "bench": ["llamarun", "bench", "shards", "--prompt-tokens", "4", "-n", "2"],
    "check": ["llamarun", "check", "shards", "--against", SHIPPED],
    "chat": ["llamarun", "chat", "shards", "-n", "2"],
}

STARTED = ("analyze", "generate with processes")
"""Those that are started as a user does. The others begin where a Python in that folder has imported the libraries."""


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every module of Python, of our dependencies and of our own has a namesake that leaves a mark."""
    folder = tmp_path_factory.mktemp("traps")
    options = ["--device", "cpu=1GiB", "--device", "cpu=1GiB", "--layers", "4,3", "-o", "plan.json"]
    run(folder, *SOLVE, *options)
    run(folder, "llamaplan", "export", "plan.json", "--model", SHIPPED, "-o", "shards")
    config = json.loads((SHIPPED / "config.json").read_text())
    small = config | {"num_hidden_layers": 1, "max_position_embeddings": 64}  # what is timed is not the point here
    (folder / "small.json").write_text(json.dumps(small))
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": "def"}\n')
    trap = "from os import environ\nopen(environ['TRAP_MARKS'] + '/' + __name__, 'w').close()\n"
    for name in {
        *sys.stdlib_module_names,
        *packages_distributions(),
        "plans",
        "planner",
        "exporter",
        "runtime",
        "tests",
    }:
        if name.isidentifier() and not name.startswith("__"):
            (folder / f"{name}.py").write_text(trap)
    for name in ("plans", "planner", "exporter", "runtime", "torch", "json", "random"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(trap)
    return folder


def unsafe(folder: Path) -> dict[str, str]:
    """The environment of somebody who never thought of it."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONSAFEPATH"}}
    return {**kept, "TRAP_MARKS": str(marks)}


def run(folder: Path, command: str, *arguments: object) -> None:
    """Run a command as its users start it."""
    done = subprocess.run(
        [COMMANDS / command, *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=unsafe(folder),
    )
    assert done.returncode == 0, done.stderr
    assert list((folder / "marks").iterdir()) == []


@pytest.fixture(scope="module")
def in_the_folder(trapped: Path) -> Iterator[Nursery]:
    """A Python that was started there and has imported torch, transformers and the runtime there."""
    with closing(Nursery(environment=unsafe(trapped), folder=trapped)) as nursery:
        yield nursery


def test_a_trap_works_for_who_starts_python_carelessly(trapped: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import json"]
    subprocess.run(command, cwd=trapped, env={"TRAP_MARKS": str(tmp_path)}, check=False)
    assert (tmp_path / "json").exists()


@pytest.mark.row("P10")
@pytest.mark.parametrize("name", STARTED)
def test_a_command_imports_nothing_from_the_current_folder(trapped: Path, name: str) -> None:
    run(trapped, *RUNS[name])


@pytest.mark.row("P10")
@pytest.mark.parametrize("name", [name for name in RUNS if name not in STARTED])
def test_what_a_command_imports_or_starts_later_is_not_from_the_current_folder(
    trapped: Path, in_the_folder: Nursery, tmp_path: Path, name: str
) -> None:
    done = in_the_folder.start(RUNS[name], output=tmp_path / "said")
    assert done.end(within=200)[0] == 0, done.said
    assert list((trapped / "marks").iterdir()) == []


@pytest.mark.row("P10")
def test_emitted_scripts_keep_python_from_the_current_folder(trapped: Path) -> None:
    """Scripts of sh by PYTHONSAFEPATH, which every Python below them obeys; one of Python by itself."""
    plan = read_plan(trapped / "plan.json")
    gpus = tuple(device.model_copy(update={"kind": "cuda"}) for device in plan.cluster.devices)
    on_gpus = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"devices": gpus})})
    for engine in ("vllm", "sglang", "tensorrt-llm", "torchrun"):
        for text in emit(on_gpus, engine=engine, directory="shards").files.values():
            assert re.search(r"^export PYTHONSAFEPATH=1\b", text, flags=re.MULTILINE)
    script = trapped / "run_transformers.py"
    script.write_text(emit(plan, engine="transformers", directory="shards").files["run_transformers.py"])
    run(trapped, "python", script)
