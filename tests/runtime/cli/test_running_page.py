"""Everything `docs/running.md` shows works."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from exporter import export
from tests.conftest import RunCommand
from tests.exporter.export_helpers import make_plan

PAGE = (Path(__file__).parents[3] / "docs" / "running.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(shipped, tmp_path / "my-model")
    export(make_plan(shipped, [3, 4], devices=["cpu#0", "cpu#1"]), model=shipped, output=tmp_path / "shards")
    (tmp_path / "prompt.txt").write_text("import os\n")
    (tmp_path / "questions.txt").write_text("What is a tuple?\n/retry\n/undo\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_run(place: Path) -> None:
    names: dict[str, object] = {}
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) >= 5
    for text in blocks:
        exec(compile(text, "docs/running.md", "exec"), names)


def test_the_commands_run(place: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = 0
    for kind, text in BLOCKS:
        if kind == "jsonl":
            (place / "prompts.jsonl").write_text(text)
        for line in text.splitlines() if kind == "sh" else []:
            words = shlex.split(line)
            if "<" in words:
                stdin = (place / words.pop()).read_bytes()
                words.remove("<")
                monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            if ">" in words:
                words = words[: words.index(">")]
            done = run_command(*words)
            assert done.code == 0, f"{line}: {done.err}"
            assert done.out or "-o" in words, line
            commands += 1
    assert commands >= 7
    results = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [result.get("id") for result in results] == [None, "second", "third"]
