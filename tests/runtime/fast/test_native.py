"""Building and loading the compiled kernels: once per machine, safely, and never fatal where it cannot be done."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from runtime.fast import native
from runtime.fast.native import Library, Unavailable


@pytest.fixture
def quick_compiler(tmp_path: Path, kernels: Library) -> tuple[str, ...]:
    """A compiler that answers at once: it hands out what the real one has built."""
    return (_script(tmp_path / "quick-cc", f'while [ "$1" != -o ]; do shift; done; cp "{kernels.path}" "$2"'),)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any compiler on its PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def _script(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$*" = --version ] && exec echo 1.0\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_second_load_finds_the_first_build(tmp_path: Path, quick_compiler: tuple[str, ...]) -> None:
    path, builds = tmp_path / "kernels.so", []
    for _ in range(2):
        assert isinstance(native.load_from(path, compiler=quick_compiler, on_build=builds.append), Library)
    assert len(builds) == 1
    assert "quick-cc" in builds[0]


def test_the_real_compiler_builds_a_library_that_loads(tmp_path: Path) -> None:
    compiler = native.find_compiler()
    assert not isinstance(compiler, Unavailable)
    assert isinstance(native.load_from(tmp_path / "kernels.so", compiler=compiler), Library)


def test_builders_at_the_same_time_leave_one_whole_library(tmp_path: Path, quick_compiler: tuple[str, ...]) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        failures = list(pool.map(lambda _: native.build(folder / "kernels.so", compiler=quick_compiler), range(4)))
    assert failures == [None] * 4
    assert [path.name for path in folder.iterdir()] == ["kernels.so"]
    assert isinstance(Library(folder / "kernels.so"), Library)


def test_a_damaged_library_is_built_again(tmp_path: Path, quick_compiler: tuple[str, ...]) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"\x7fELF, once")
    assert isinstance(native.load_from(path, compiler=quick_compiler), Library)


@pytest.mark.parametrize("how", ["others can write it", "a link to another place"])
def test_a_library_that_somebody_else_may_have_put_there_is_built_again(
    how: str, tmp_path: Path, quick_compiler: tuple[str, ...], kernels: Library
) -> None:
    path, builds = tmp_path / "kernels.so", []
    if how == "others can write it":
        path.write_bytes(kernels.path.read_bytes())
        path.chmod(0o777)
    else:
        path.symlink_to(kernels.path)
    assert isinstance(native.load_from(path, compiler=quick_compiler, on_build=builds.append), Library)
    assert len(builds) == 1
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o700


def test_cache_folder_is_private_and_named_after_everything_that_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_compiler: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", quick_compiler[0])
    assert isinstance(native.load(), Library)
    folder = tmp_path / "cache" / "llamaplan"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CC", f"{quick_compiler[0]} --other-option")
    assert isinstance(native.load(), Library)
    assert len(list(folder.glob("kernels-*.so"))) == 2


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_that_others_can_write_or_nobody_can_is_not_used(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_compiler: tuple[str, ...]
) -> None:
    folder = tmp_path / "llamaplan"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setattr(os, "access", lambda path, _mode: bool(Path(path).stat().st_mode & 0o200))  # root may all
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", quick_compiler[0])
    assert isinstance(native.load(), Library)
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reason_is_given() -> None:
    found = native.load()
    assert isinstance(found, Unavailable)
    assert found.reason == "there is no C compiler here (looked for cc, gcc, clang)"


def test_a_compiler_that_fails_is_named_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _script(tmp_path / "broken-cc", "echo no such luck >&2; exit 3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", compiler)
    found = native.load()
    assert isinstance(found, Unavailable)
    assert compiler in found.reason
    assert "no such luck" in found.reason
    assert list((tmp_path / "cache" / "llamaplan").iterdir()) == []


def test_a_compiler_that_makes_something_else_gives_no_library(tmp_path: Path) -> None:
    compiler = _script(tmp_path / "odd-cc", 'while [ "$1" != -o ]; do shift; done; echo odd > "$2"')
    found = native.load_from(tmp_path / "kernels.so", compiler=(compiler,))
    assert isinstance(found, Unavailable)
    assert "cannot be loaded" in found.reason


def test_reading_memory_covers_every_tensor(kernels: Library) -> None:
    tensors = [torch.zeros(3), torch.zeros(100_003, dtype=torch.bfloat16), torch.zeros(0)]
    assert kernels.read_memory(tensors, threads=2) == 12 + 200_006


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_may_lie_at_any_address(kernels: Library, dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(0)
    hidden, norm, weight = torch.randn(3, 41).to(dtype), torch.ones(41, dtype=dtype), torch.randn(37, 41).to(dtype)
    aligned = _logits(kernels, hidden, norm, weight, weight.data_ptr())
    size = weight.numel() * weight.element_size()
    buffer = ctypes.create_string_buffer(size + offset)
    ctypes.memmove(ctypes.addressof(buffer) + offset, weight.data_ptr(), size)
    assert torch.equal(aligned, _logits(kernels, hidden, norm, weight, ctypes.addressof(buffer) + offset))


def _logits(
    kernels: Library, hidden: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, address: int
) -> torch.Tensor:
    logits = hidden.new_empty(len(hidden), len(weight))
    count = kernels.num_counters(native.Shape(), num_layers=0, vocab_size=len(weight))
    scratch, counters = torch.empty(100_000), torch.empty(count, dtype=torch.int64)
    head = native.Head(
        openmp=kernels.openmp_address,
        threads=2,
        dtype=native.DTYPES[hidden.dtype],
        rows=len(hidden),
        hidden_size=hidden.shape[1],
        vocab_size=len(weight),
        norm_eps=1e-6,
        logits_scaling=1.0,
        inputs=hidden.data_ptr(),
        norm=norm.data_ptr(),
        weight=native.Linear(weight=address),
        logits=logits.data_ptr(),
        workspace=scratch.data_ptr(),
        counters=counters.data_ptr(),
    )
    kernels.compute_logits(head)
    return logits
