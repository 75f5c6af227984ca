"""The worked example in docs/planning.md is what the commands really print."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import RunCommand

TEXT = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
CONFIG = re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL)
EXAMPLES = re.findall(r"```console\n\$ llamaplan ([^\n]*)\n(.*?)\n```", TEXT, flags=re.DOTALL)
COLUMNS = 100
"""Width of the terminal the examples were printed on."""


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command.split()[0] for command, _shown in EXAMPLES])
def test_an_example_prints_what_the_page_shows(
    command: str, shown: str, run_command: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama-8b").mkdir()
    (tmp_path / "llama-8b" / "config.json").write_text(CONFIG[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    if "plan.json" in command.split():  # made by an earlier example
        first = next(earlier for earlier, _shown in EXAMPLES if earlier.endswith("-o plan.json"))
        run_command("llamaplan", *shlex.split(first))
    done = run_command("llamaplan", *shlex.split(command))
    printed = [line.rstrip() for line in (done.out or done.err).splitlines()]
    lines = shown.splitlines()
    if lines[0] == "...":
        lines = lines[1:]
        printed = printed[-len(lines) :]
    assert printed == lines


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) >= 7
    assert json.loads(CONFIG[0])["num_hidden_layers"] == 32
