"""Who may import whom, and which commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"plans", "planner", "exporter", "runtime"}
ALLOWED = {
    "plans": set(),
    "planner": {"plans"},
    "exporter": {"plans"},
    "runtime": {"plans"},
}
EXTRA = {
    "planner/cli/": {"exporter"},
    "planner/measure/": {"runtime"},
}
"""The planner's command line drives the exporter and reads its partitions; only measuring times real stages."""


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & OURS


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | EXTRA.get(f"{name.rpartition('/')[0]}/", set()) | {package}
        assert imported_packages(path) <= allowed, name


def modules_loaded_by(*arguments: str) -> set[str]:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['llamaplan', *{list(arguments)!r}]\n"
        "from planner.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as leave:\n    assert not leave.code, leave.code\n"
        "sys.stderr.write('\\n'.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return {line.split(".")[0] for line in done.stderr.splitlines()}


def test_help_imports_neither_torch_nor_a_solver() -> None:
    assert not modules_loaded_by("--help") & {"torch", "transformers", "pulp", "highspy", "networkx", "numpy", "jinja2"}


def test_analyze_and_solve_never_import_torch(tmp_path: Path) -> None:
    model = str(ROOT / "tests/checkpoint/python-llama")
    assert "torch" not in modules_loaded_by("analyze", model)
    plan = tmp_path / "plan.json"
    assert "torch" not in modules_loaded_by("solve", model, "--device", "cpu=1GiB", "-o", str(plan))
    assert "HiGHS" in plan.read_text(encoding="utf-8")
