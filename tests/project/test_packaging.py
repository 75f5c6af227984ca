"""The wheel that users install holds everything and its commands start."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel alone; the libraries are lent by path, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    # Without --ignore-installed pip would first remove the copy that these tests run from.
    install = [sys.executable, "-m", "pip", "install", "--ignore-installed", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--prefix", str(folder), str(wheel)], check=True, timeout=300)
    libraries = Path(pytest.__file__).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_holds_the_packages_templates_c_sources_and_type_markers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("plans", "planner", "exporter", "runtime"):
        assert f"{package}/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    for home, pattern in (("exporter", "*.j2"), ("planner", "*.j2"), ("plans", "*.c"), ("runtime", "*.[ch]")):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / home).rglob(pattern)}
        assert sources
        assert sources <= set(names)


@pytest.mark.row("P16")
def test_no_install_takes_the_solver_that_proved_wrong_optima(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needs = [Requirement(text) for text in Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")]
    (solver,) = [need.specifier for need in needs if need.name == "highspy"]
    assert "1.14.0" not in solver
    assert {"1.11.0", "1.13.1", "1.14.1", "1.16.0"} <= set(solver.filter(["1.11.0", "1.13.1", "1.14.1", "1.16.0"]))
    pinned = re.search(r"^highspy==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in solver


@pytest.mark.parametrize("command", ["llamaplan", "llamarun"])
def test_both_commands_start_from_the_wheel(clean_bin: Path, command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    for arguments in (["--help"], ["--version"]):
        # The wheel's own copy must run: the working folder is elsewhere and the editable install is not on the path.
        script = [str(clean_bin / "python"), str(clean_bin / command), *arguments]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert command in done.stdout
