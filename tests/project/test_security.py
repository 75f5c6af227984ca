"""What docs/security.md promises, read from the sources: a new command or a new call cannot slip by."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from planner.cli.main import app as llamaplan
from runtime.cli.main import app as llamarun

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("plans", "planner", "exporter", "runtime") for path in (ROOT / package).rglob("*.py")]

FORBIDDEN = (
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "marshal.loads",
    "shelve.open",
    "__import__",
)
"""Calls that run what they are given."""
PICKLED = "planner/program/session.py"
"""The one file that unpickles: a pipe to our own child."""


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), node


def test_nothing_runs_what_it_reads() -> None:
    for file, call in calls():
        name = ast.unparse(call.func)
        assert name not in FORBIDDEN, f"{file}: {name}"
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            assert file == PICKLED, file
        for keyword in call.keywords:
            value = ast.unparse(keyword.value)
            assert (keyword.arg, value) != ("shell", "True"), f"{file}: {name}"
            assert keyword.arg != "trust_remote_code" or value == "False", f"{file}: {name}"


def test_whatever_transformers_loads_from_a_folder_may_run_no_code_and_fetch_nothing() -> None:
    loads = [(file, call) for file, call in calls() if ast.unparse(call.func).endswith(".from_pretrained")]
    assert loads
    for file, call in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("local_files_only") == "True", f"{file}:{call.lineno}"
        if "GenerationConfig" not in ast.unparse(call.func):  # holds numbers only
            assert given.get("trust_remote_code") == "False", f"{file}:{call.lineno}"


def test_every_python_that_is_started_keeps_the_current_folder_out() -> None:
    starts = (
        "subprocess.run",
        "subprocess.Popen",
        "subprocess.check_output",
        "subprocess.call",
        "os.execv",
        "os.spawnv",
    )
    for file, call in calls():
        if ast.unparse(call.func) in starts and call.args:
            assert "sys.executable" not in ast.unparse(call.args[0]), f"{file}:{call.lineno}"


@pytest.mark.parametrize(("app", "name"), [(llamaplan, "llamaplan"), (llamarun, "llamarun")])
def test_the_page_has_every_command_in_its_table(app: typer.Typer, name: str) -> None:
    rows = re.findall(rf"^\| (`{name} .*?) \|", (ROOT / "docs" / "security.md").read_text(), flags=re.MULTILINE)
    listed = {word for row in rows for word in re.findall(r"`([^`]*)`", row.replace(f"{name} ", ""))}
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert listed == commands
