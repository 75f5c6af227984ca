"""The contract of `docs/faults.md`: every row is tested somewhere, by a test that is marked with the row's id."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests import test_faults, test_faults_planning

ROOT = Path(__file__).parents[2]


def documented() -> list[str]:
    """Lines of the page's table begin with `| E1-E17 |` or `| P10 |`."""
    rows: list[str] = []
    page = (ROOT / "docs" / "faults.md").read_text()
    for letter, first, last in re.findall(r"^\| ([A-Z])(\d+)(?:-\1(\d+))? \|", page, flags=re.MULTILINE):
        rows += [f"{letter}{number}" for number in range(int(first), int(last or first) + 1)]
    return rows


@cache
def marked() -> set[str]:
    """Ids in the markers `pytest.mark.row("E3", "E4")` of tests and of whole files of tests."""
    nodes = [node for path in (ROOT / "tests").rglob("test_*.py") for node in ast.walk(ast.parse(path.read_bytes()))]
    marks = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row"]
    return {argument.value for mark in marks for argument in mark.args if isinstance(argument, ast.Constant)}


@pytest.fixture
def tabled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids in the tables, each line of which is marked with its own."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "hostile")
    from hostile_bundles import BUNDLES
    from hostile_checkpoints import CHECKPOINTS

    clusters = {name.split()[0] for name in test_faults_planning.ROWS}
    return clusters | {row.id for row in test_faults.ROWS} | {case.row for case in (CHECKPOINTS | BUNDLES).values()}


def test_the_page_lists_every_kind_of_row() -> None:
    assert {row[0] for row in documented()} >= set("CKDXLEBR")


@pytest.mark.parametrize("row", documented())
def test_a_row_of_the_contract_is_tested_by_name(row: str, tabled: set[str]) -> None:
    assert row in marked() | tabled


def test_a_marker_names_a_row_of_the_contract(tabled: set[str]) -> None:
    assert marked() | tabled <= set(documented())
