"""The contract of `docs/faults.md`: every row is tested somewhere, by a test that carries the row's id."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def documented() -> list[str]:
    ranges = re.findall(r"^\| ([A-Z])1-\1(\d+) \|", (ROOT / "docs" / "faults.md").read_text(), flags=re.MULTILINE)
    return [f"{letter}{number}" for letter, last in ranges for number in range(1, int(last) + 1)]


def named_rows() -> set[str]:
    """Ids in the tables of faults and hostile files, and those that a docstring names as `Row E3` or `Rows E3, E4`."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        if path.name.startswith(("test_faults", "hostile_")):
            found |= set(re.findall(r'"([A-Z]\d+)[" ]', text))
        if path != Path(__file__):
            for ids in re.findall(r"Rows? ((?:[A-Z]\d+(?:, | and )?)+)", text):
                found |= set(re.findall(r"[A-Z]\d+", ids))
    return found


def test_the_page_lists_every_kind_of_row() -> None:
    assert {row[0] for row in documented()} >= set("CKDXLEBR")


@pytest.mark.parametrize("row", documented())
def test_a_row_of_the_contract_is_tested_by_name(row: str) -> None:
    assert row in named_rows()
