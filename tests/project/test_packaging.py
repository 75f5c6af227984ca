"""The wheel that users install holds everything and its commands start."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_holds_the_packages_templates_and_type_markers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("plans", "planner", "exporter", "runtime"):
        assert f"{package}/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    sources = {p.relative_to(ROOT).as_posix() for home in ("exporter", "planner") for p in (ROOT / home).rglob("*.j2")}
    assert sources
    assert sources <= set(names)


@pytest.mark.parametrize("command", ["llamaplan", "llamarun"])
def test_both_commands_start_from_the_wheel(clean_bin: Path, command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    for arguments in (["--help"], ["--version"]):
        # The wheel's own copy must run: the working folder is elsewhere and the editable install is not on the path.
        script = [str(clean_bin / "python"), str(clean_bin / command), *arguments]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert command in done.stdout
