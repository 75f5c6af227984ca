"""Who may import whom, and which commands stay light."""

import ast
import subprocess
import sys
from functools import cache
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
    "planner/measure/processor/": {"runtime"},
    "exporter/calibrate/": {"runtime"},
}
"""The planner's command line drives the exporter and reads its partitions; measuring and calibrating run stages."""


FLOORS = {
    "plans": (
        *(
            "errors",
            "dtypes",
            "cuts",
            "reading",
            "commands",
            "native",
            "engines",
            "packed",
            "config",
            "gguf",
            "checkpoint",
            "profile",
            "cluster",
        ),
        *("stages", "workload", "memory", "plan", "sensitivity", "run", "check", "export", "schemas"),
    ),
    "planner": (
        *("model", "devices", "timing", "problem", "program", "proof", "answers", "measure", "simulate", "rivals"),
        *("show", "report", "cli", "api"),
    ),
    "exporter": (
        *(
            "convert",
            "foreign",
            "layout",
            "sources",
            "root_files",
            "binding",
            "values",
            "disk",
            "packing",
            "verify",
            "stream",
            "job",
            "calibrate",
            "packers",
            "write",
        ),
        "emit",
    ),
    "runtime": (
        *(
            "stage_time",
            "reading",
            "fast",
            "stages",
            "generate",
            "steps",
            "prepared",
            "session",
            "distributed.control",
            "distributed",
            "engine",
        ),
        *("results", "chat", "batch", "serve", "cli", "worker"),
    ),
}
"""The wings of each package from the ground up: one imports only those before it, also late, inside a function."""
STRANGERS = {("program", "proof"), ("proof", "program")}
"""The second opinion shares nothing with the first."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Our modules that a module names in any import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found & MODULES.keys())


def wing_of(module: str) -> str:
    """The longest entry of `FLOORS` that a module lies in; empty for a package's own `__init__`."""
    package, _, rest = module.partition(".")
    wings = [wing for wing in FLOORS[package] if rest == wing or rest.startswith(f"{wing}.")]
    assert wings or not rest, f"{module} has no place in FLOORS"
    return max(wings, key=len, default="")


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    for module in MODULES:
        if module.partition(".")[0] == package:
            path = MODULES[module].relative_to(ROOT).as_posix()
            allowed = ALLOWED[package] | EXTRA.get(f"{path.rpartition('/')[0]}/", set()) | {package}
            assert {name.partition(".")[0] for name in imports_of(module)} <= allowed, path


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_wing_imports_only_wings_below_it(package: str) -> None:
    floors = FLOORS[package]
    for module in MODULES:
        wing = wing_of(module)
        if module.partition(".")[0] != package or not wing:
            continue
        for name in imports_of(module):
            other = wing_of(name)
            if name.partition(".")[0] == package and other not in {wing, ""}:
                assert floors.index(other) < floors.index(wing), f"{module} imports {name}"
                assert (wing, other) not in STRANGERS, f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in sorted(imports_of(module) - {module.rpartition(".")[0]}):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("package", sorted(OURS))
def test_no_folder_holds_more_than_fourteen_files(package: str) -> None:
    for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
        files = list(folder.glob("*.py"))
        assert len(files) <= 14, folder


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
