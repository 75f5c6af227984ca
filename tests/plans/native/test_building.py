"""Building and loading C: once per machine, safely, and never fatal where it cannot be done."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from plans.native import building
from plans.native.building import Source, Unavailable, build, find_compiler, load, load_from


class Seven:
    """A library of one function."""

    def __init__(self, path: Path) -> None:
        self.call: Callable[[], int] = ctypes.CDLL(str(path)).seven


@dataclass(frozen=True, slots=True)
class Built:
    """Some C, and the library that the real compiler made of it."""

    source: Source
    path: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("source")
    (folder / "number.h").write_text("#define NUMBER 7\n")
    (folder / "seven.c").write_text('#include "number.h"\nint seven(void) { return NUMBER; }\n')
    source = Source("seven", "numbers", folder / "seven.c", headers=(folder / "number.h",))
    compiler = find_compiler()
    assert not isinstance(compiler, Unavailable)
    assert build(folder / "seven.so", source, compiler=compiler) is None
    return Built(source, folder / "seven.so")


@pytest.fixture
def quick_compiler(tmp_path: Path, built: Built) -> tuple[str, ...]:
    """A compiler that answers at once: it hands out what the real one has built."""
    return (_script(tmp_path / "quick-cc", f'while [ "$1" != -o ]; do shift; done; cp "{built.path}" "$2"'),)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any compiler on its PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def _script(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$*" = --version ] && exec echo 1.0\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_second_load_finds_the_first_build(tmp_path: Path, built: Built, quick_compiler: tuple[str, ...]) -> None:
    path, builds = tmp_path / "seven.so", []
    for _ in range(2):
        found = load_from(path, built.source, Seven, compiler=quick_compiler, on_build=builds.append)
        assert isinstance(found, Seven)
    assert len(builds) == 1
    assert builds[0] == f"compiling the numbers with {quick_compiler[0]} (once per machine)"


def test_the_real_compiler_builds_a_library_that_loads(built: Built) -> None:
    assert Seven(built.path).call() == 7


def test_builders_at_the_same_time_leave_one_whole_library(
    tmp_path: Path, built: Built, quick_compiler: tuple[str, ...]
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        failures = pool.map(lambda _: build(folder / "seven.so", built.source, compiler=quick_compiler), range(4))
    assert list(failures) == [None] * 4
    assert [path.name for path in folder.iterdir()] == ["seven.so"]
    assert Seven(folder / "seven.so").call() == 7


def test_a_damaged_library_is_built_again(tmp_path: Path, built: Built, quick_compiler: tuple[str, ...]) -> None:
    path = tmp_path / "seven.so"
    path.write_bytes(b"\x7fELF, once")
    assert isinstance(load_from(path, built.source, Seven, compiler=quick_compiler), Seven)


@pytest.mark.parametrize("how", ["others can write it", "a link to another place"])
def test_a_library_that_somebody_else_may_have_put_there_is_built_again(
    how: str, tmp_path: Path, built: Built, quick_compiler: tuple[str, ...]
) -> None:
    path, builds = tmp_path / "seven.so", []
    if how == "others can write it":
        path.write_bytes(built.path.read_bytes())
        path.chmod(0o777)
    else:
        path.symlink_to(built.path)
    found = load_from(path, built.source, Seven, compiler=quick_compiler, on_build=builds.append)
    assert isinstance(found, Seven)
    assert len(builds) == 1
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o700


def test_cache_folder_is_private_and_named_after_everything_that_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built, quick_compiler: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", quick_compiler[0])
    assert isinstance(load(built.source, Seven), Seven)
    folder = tmp_path / "cache" / "llamaplan"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CC", f"{quick_compiler[0]} --other-option")
    assert isinstance(load(built.source, Seven), Seven)
    (tmp_path / "number.h").write_text("#define NUMBER 8\n")
    other = Source("seven", "numbers", built.source.file, headers=(tmp_path / "number.h",))
    assert isinstance(load(other, Seven), Seven)
    assert len(list(folder.glob("seven-*.so"))) == 3


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_that_others_can_write_or_nobody_can_is_not_used(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built, quick_compiler: tuple[str, ...]
) -> None:
    folder = tmp_path / "llamaplan"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setattr(os, "access", lambda path, _mode: bool(Path(path).stat().st_mode & 0o200))  # root may all
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", quick_compiler[0])
    assert isinstance(load(built.source, Seven), Seven)
    assert list(folder.iterdir()) == []


def test_a_cache_folder_that_takes_nothing_does_not_stop_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built, quick_compiler: tuple[str, ...]
) -> None:
    monkeypatch.setattr(building, "cache_folder", lambda: tmp_path / "gone")
    monkeypatch.setenv("CC", quick_compiler[0])
    assert isinstance(load(built.source, Seven), Seven)


def test_options_of_a_library_reach_the_compiler_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "six.c").write_text("int seven(void) { return NUMBER; }\n")
    for number in (6, 5):
        found = load(Source("six", "numbers", tmp_path / "six.c", options=(f"-DNUMBER={number}",)), Seven)
        assert isinstance(found, Seven)
        assert found.call() == number


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reason_is_given(built: Built) -> None:
    found = load(built.source, Seven)
    assert isinstance(found, Unavailable)
    assert found.reason == "there is no C compiler here (looked for cc, gcc, clang)"


def test_a_compiler_that_fails_is_named_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Built
) -> None:
    compiler = _script(tmp_path / "broken-cc", "echo no such luck >&2; exit 3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", compiler)
    found = load(built.source, Seven)
    assert isinstance(found, Unavailable)
    assert found.reason == f"{compiler} cannot compile the numbers: no such luck"
    assert list((tmp_path / "cache" / "llamaplan").iterdir()) == []


def test_a_compiler_that_makes_something_else_gives_no_library(tmp_path: Path, built: Built) -> None:
    compiler = _script(tmp_path / "odd-cc", 'while [ "$1" != -o ]; do shift; done; echo odd > "$2"')
    found = load_from(tmp_path / "seven.so", built.source, Seven, compiler=(compiler,))
    assert isinstance(found, Unavailable)
    assert "the compiled numbers cannot be loaded" in found.reason
