"""`make test` runs every test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def has_marker(path: Path, name: str) -> bool:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    return any(isinstance(node, ast.Attribute) and ast.unparse(node) == f"pytest.mark.{name}" for node in nodes)


def test_those_that_run_alone_lie_where_it_looks_for_them() -> None:
    found = re.search(r"pytest -m alone (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if has_marker(path, "alone")]
    assert found
    assert marked
    assert [path for path in marked if ROOT / found[1] not in path.parents] == []
